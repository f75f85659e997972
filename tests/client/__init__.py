"""Tests of the client: against a scripted server, on a loop, and against a live one."""
