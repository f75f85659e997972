"""What each site of a model looks like, learnt without weights. `signature` is the way in."""
