"""One instance of every message, for the golden files. Each field has a value worth keeping.

When a message gets a new field, leave its instance (its golden file has not got the field) and add
another one, with the field, under a key such as `Submit-2`.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from weft.graph.frame import Frame
from weft.graph.node import (
    Apply,
    Backward,
    Bound,
    Call,
    Complex,
    Const,
    Fill,
    Grad,
    Graph,
    Guard,
    Log,
    Loop,
    Map,
    Mark,
    Name,
    Param,
    Read,
    Ref,
    Regrad,
    Save,
    Seq,
    Shape,
    Skip,
    Slice,
    Stop,
    Write,
)
from weft.graph.site import Site, Where
from weft.wire import frames
from weft.wire import messages as m

SITE = Site("model.layers.1.mlp", "output", call=1, step=2)
FRAME = Frame("float32", (2, 1), bytes(range(8)))
IDS = Frame("int64", (1, 2), b"\5" + bytes(7) + b"\7" + bytes(7))
DIGEST = frames.digest(FRAME)
TENSORS = frames.write({DIGEST: FRAME, "input_ids": IDS})
MARK = "5f0c" * 16

GRAPH = Graph(
    nodes=(
        Read(site=SITE, leaf=(0, "hidden"), shape=(1, 9, 4), dtype="bfloat16", at=1),
        Const(key="c0", shape=(2, 1), dtype="float32"),
        Param(path="lm_head.weight", shape=(5, 4), dtype="float16"),
        Call(
            op="Tensor.__getitem__",
            args=(Ref(0), Seq("tuple", (Name("ellipsis"), Slice(None, -1, 2)))),
            alias=(Ref(0),),
            grad=False,
        ),
        Call(op="zeros", args=(Shape(Ref(0)),), kwargs=(("dtype", Name("dtype", "float32")),)),
        Call(op="Tensor.mul_", args=(Ref(0), 2.5), writes=(Ref(0),), alias=(Ref(0),)),
        Call(op="rand_like", args=(Ref(1),), draw=3),
        Call(op="Tensor.topk", args=(Ref(1), 1), outs=2),
        Call(op="Tensor.mul", args=(Ref(1), Complex(1.5, -0.5))),
        Apply(
            path="lm_head",
            args=(Ref(0),),
            kwargs=(("scale", Name("float", "inf")),),
            outs=2,
            types=(("float32", (1, 9, 5)), ("int64", ())),
            grad=False,
        ),
        Write(site=SITE, leaf=(1,), value=Ref(1)),
        Fill(site=SITE, leaf=(0, "hidden"), value=Ref(5)),
        Guard(value=Ref(7, 1), expected=Seq("list", (True, 3, "x")), look="shape"),
        Save(name="h", value=Map(("a", "b"), (Ref(0), Seq("size", (1, 9))))),
        Log(parts=("norm", Ref(1), None)),
    ),
    where=(Where("steer.py", 3), Where("steer.py", 12, "h[:, -1] *= 2.5")),
    bounds=(Bound(Ref(0), 1, 9, at=1),),
    seed=11,
)
OPTIONS = m.LanguageOptions(
    use_cache=True,
    output_hidden_states=True,
    output_attentions=True,
    output_router_logits=True,
    logits_to_keep=2,
)
LANGUAGE = m.LanguageInputs(given=("input_ids", "attention_mask"), options=OPTIONS)
PLAIN = m.PlainInputs(
    args=(Ref(0), Seq("list", (1, 2.0, "three", None))),
    kwargs=(("mask", Map(("left",), (Ref(1),))), ("cut", Slice(0, 3, None))),
)
LAYOUT = m.Layout(dtype="float32", shape=(2, 3), stride=(3, 1), offset=4)
CHAT = m.ChatMessage(role="user", content="Où est la tour ?\n")
LIMITS = m.Limits(
    body_bytes=1,
    constant_bytes=2,
    result_bytes=3,
    memory_bytes=4,
    flops=10**15,
    nodes=6,
    price_seconds=0.5,
    run_seconds=300.0,
    log_bytes=9,
    queued_jobs=10,
)
INFO = m.ModelInfo(
    id="tiny",
    family="language",
    class_name="LlamaForCausalLM",
    fingerprint=MARK,
    dtype="bfloat16",
    parameters=924_544,
    state="failed",
    reason="not enough memory",
)
WEIGHT = m.TensorCard(name="weight", dtype="float16", shape=(5, 4), of="embed.weight")
MODULE = m.ModuleCard(
    path="model.layers",
    kind="ModuleList",
    base="list",
    parameters=(WEIGHT,),
    buffers=(m.TensorCard(name="cos", dtype="float32", shape=()),),
    plain={"eps": 1e-6, "bias": None, "training": False, "heads": 4, "act": "silu"},
    rule="same",
    of="layers",
    details="4, eps=1e-06",
)
TOKENIZER = m.TokenizerCard(
    json='{"version":"1.0"}', decodes=True, chat=True, special={"pad_token": ("<pad>", 0)}
)
PRICE = m.PriceInfo(
    sites=2,
    operations=5,
    flops=2**40,
    constant_bytes=8,
    saved_bytes=144,
    peak_bytes=4096,
    ends=SITE,
)
RESULT = m.ResultInfo(bytes=1234, sha256=MARK, names=("h", "line 3"))
REPORT = m.ErrorReport(
    code="run",
    message="index 9 is out of range",
    line="steer.py:12: h[:, 9]",
    fix="take a smaller one",
    kind="IndexError",
    request_id="r-1",
    missing=(DIGEST,),
)
USED = m.UsageRow(
    owner="ann",
    day="2026-01-31",
    model="tiny",
    jobs=2,
    cost=1.5e12,
    seconds=3.25,
    up=10,
    down=20,
    requests=4,
    refusals=1,
    weights=4096,
)
JOB = m.JobInfo(
    id="j_1",
    state="failed",
    model="tiny",
    created=1.7e9,
    look=True,
    attempts=2,
    ahead=3,
    price=PRICE,
    result=RESULT,
    error=REPORT,
    stages={"price": 0.25, "run": 1.5},
    expires=1.8e9,
)

GENERATION = m.Generation(
    max_new_tokens=8,
    max_length=99,
    min_new_tokens=1,
    min_length=2,
    do_sample=True,
    temperature=0.5,
    top_k=None,
    top_p=0.9,
    min_p=0.1,
    typical_p=0.2,
    epsilon_cutoff=0.25,
    eta_cutoff=0.125,
    repetition_penalty=1.5,
    no_repeat_ngram_size=3,
    bad_words_ids=((1, 2), (3,)),
    suppress_tokens=(4,),
    begin_suppress_tokens=(5, 6),
    forced_bos_token_id=7,
    forced_eos_token_id=(8,),
    exponential_decay_length_penalty=(2, 1.25),
    remove_invalid_values=True,
    renormalize_logits=True,
    eos_token_id=(9, 10),
    pad_token_id=0,
    stop_strings=("end",),
    use_cache=False,
    logits_to_keep=0,
    output_attentions=True,
    output_hidden_states=True,
    seed=2**63 - 1,
)

INSTANCES: dict[str, Struct] = {
    "LanguageOptions": OPTIONS,
    "LanguageInputs": LANGUAGE,
    "LanguageInputs-encoder": m.LanguageInputs(given=("input_ids", "decoder_input_ids")),
    "PlainInputs": PLAIN,
    "Submit": m.Submit(
        protocol=1,
        request_id="Req_1-a",
        model="tiny",
        fingerprint=MARK,
        graph=GRAPH,
        inputs=LANGUAGE,
        constants={"c0": DIGEST},
        tensors=TENSORS,
        strict=False,
        look=True,
        weights=MARK,
    ),
    "Submit-2": m.Submit(
        protocol=1,
        request_id="Req_2-b",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site(path="h.1", port="output", invoke=1), shape=(1, 3)),
                Save(name="h", value=Ref(0)),
            )
        ),
        inputs=LANGUAGE,
        further=(LANGUAGE, PLAIN),
        alone=True,
    ),
    "Submit-5": m.Submit(
        protocol=1,
        request_id="Req_5-e",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("h.1", "output"), shape=(1, 3)),
                Call(op="sum", args=(Ref(0),)),
                Backward(
                    losses=(Ref(1), Ref(0)),
                    seeds=(None, Ref(0)),
                    since=(Site("h.1", "inputs"),),
                    create=True,
                ),
                Grad(backward=2, of=Ref(0), zeros=True),
                Regrad(backward=2, of=Ref(0), value=Ref(3)),
                Save(name="g", value=Ref(3)),
            )
        ),
        inputs=LANGUAGE,
    ),
    "Submit-7": m.Submit(
        protocol=1,
        request_id="Req_6-f",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("h.1", "output"), shape=(1, 3)),
                Loop(
                    start=1,
                    stop=8,
                    by=2,
                    takes=(Ref(0),),
                    body=(
                        Read(site=Site("h.1", "output"), shape=(1, 1)),
                        Call(op="rand_like", args=(Ref(1),), draw=3),
                        Write(site=Site("h.1", "output"), value=Ref(2)),
                        Log(parts=("h", Ref(1))),
                        Stop(condition=Ref(2), invoke=0),
                    ),
                    gives=(Ref(2), Ref(0)),
                ),
                Loop(
                    start=1,
                    stop=8,
                    by=2,
                    along=(Ref(1, 0),),
                    body=(Write(site=Site("h.2", "output"), value=Ref(0)),),
                ),
                Read(site=Site("", "result"), shape=(1, 9), dtype="int64"),
                Stop(condition=Ref(0), step=3),
                Save(name="all", value=Seq("list", (Ref(1, 0), Ref(1, 7), Ref(3)))),
            )
        ),
        inputs=LANGUAGE,
        generation=GENERATION,
    ),
    "Submit-generations": m.Submit(
        protocol=1,
        request_id="Req_a-j",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("", "result", invoke=1), shape=(1, 9), dtype="int64"),
                Save(name="ids", value=Ref(0)),
                Read(site=Site("h.1", "output"), shape=(1, 2)),
                Call(op="rand_like", args=(Ref(2),), draw=512 << 32, seed=3),
                Save(name="noise", value=Ref(3)),
            )
        ),
        inputs=LANGUAGE,
        further=(LANGUAGE,),
        generations=(GENERATION, m.Generation(max_new_tokens=5, seed=3)),
    ),
    "Generation": GENERATION,
    "Limits-2": replace(LIMITS, new_tokens=7),
    "Limits-3": replace(LIMITS, stream_bytes=8),
    "Generation-2": m.Generation(max_length=64),
    "SignatureQuery-2": m.SignatureQuery(
        model="tiny", fingerprint=MARK, inputs=LANGUAGE, tensors=TENSORS, turn="next"
    ),
    "Submit-log": m.Submit(
        protocol=1,
        request_id="Req_8-h",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("", "inputs", step=2), leaf=(1, "input_ids"), shape=(1, 1)),
                Log(parts=("step", 2), after=Ref(0)),
            )
        ),
        inputs=LANGUAGE,
    ),
    "Submit-root": m.Submit(
        protocol=1,
        request_id="Req_9-i",
        model="net",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("", "output"), leaf=("z",), shape=(1, 3)),
                Save(name="z", value=Ref(0)),
            ),
            root="encode",
        ),
        inputs=PLAIN,
    ),
    "Submit-stream": m.Submit(
        protocol=1,
        request_id="Req_9-i",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("a", "output"), shape=(1, 1)),
                Log(parts=("step", Ref(0)), stream=1),
            )
        ),
        inputs=LANGUAGE,
    ),
    "Submit-keep": m.Submit(
        protocol=1,
        request_id="Req_9-i",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("a", "output"), shape=(1, 1)),
                Save(name="h", value=Ref(0)),
            )
        ),
        inputs=LANGUAGE,
        keep_seconds=3600.0,
    ),
    "Submit-4": m.Submit(
        protocol=1,
        request_id="Req_4-d",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("h.1", "inputs"), leaf=(0, 0), shape=(1, 3)),
                Skip(
                    site=Site("h.1", "output", call=2),
                    values=(Ref(0), Ref(0)),
                    leaves=((0,), (1, "x")),
                ),
                Skip(site=Site("h.2", "output"), values=(Ref(0),)),
                Stop(condition=Ref(0), invoke=3),
                Stop(),
                Save(name="h", value=Ref(0)),
            )
        ),
        inputs=LANGUAGE,
    ),
    "Submit-6": m.Submit(
        protocol=1,
        request_id="Req_6-f",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(
            nodes=(
                Read(site=Site("h.2", "source.a_0.source.b_1.output", call=3), shape=(1, 2)),
                Save(name="h", value=Ref(0)),
            ),
            sources=(
                Mark(path="h.2", digest=MARK),
                Mark(path="h.2", digest=DIGEST, inside=("a_0",)),
            ),
        ),
        inputs=LANGUAGE,
    ),
    "MissingQuery": m.MissingQuery(digests=(DIGEST, MARK)),
    "SignatureQuery": m.SignatureQuery(
        model="tiny", fingerprint=MARK, inputs=PLAIN, tensors=TENSORS
    ),
    "Layout": LAYOUT,
    "SourceQuery": m.SourceQuery(
        model="tiny",
        fingerprint=MARK,
        path="model.layers.0.self_attn",
        inside=("attention_interface_0",),
        inputs=PLAIN,
        tensors=TENSORS,
        sites=True,
    ),
    "SourceQuery-2": m.SourceQuery(
        model="tiny",
        fingerprint=MARK,
        path="model.layers.0.self_attn",
        inside=("attention_interface_0",),
        inputs=LANGUAGE,
        tensors=TENSORS,
        sites=True,
        turn="next",
    ),
    "ApplyQuery": m.ApplyQuery(
        model="tiny",
        fingerprint=MARK,
        path="model.norm",
        layouts=(LAYOUT,),
        args=(Ref(0),),
        kwargs=(("eps", 0.5),),
    ),
    "ChatMessage": CHAT,
    "TokensQuery": m.TokensQuery(
        model="tiny",
        texts=("a", "日本"),
        chats=((CHAT,),),
        rows=((5, 7), ()),
        add_special_tokens=False,
        add_generation_prompt=False,
        skip_special_tokens=True,
    ),
    "Limits": LIMITS,
    "Hello": m.Hello(
        protocols=(1, 2), version="0.2.0", capabilities=("looks", "events"), limits=LIMITS
    ),
    "ModelInfo": INFO,
    "ModelList": m.ModelList(models=(INFO,)),
    "TensorCard": WEIGHT,
    "ModuleCard": MODULE,
    "TokenizerCard": TOKENIZER,
    "ModelCard": m.ModelCard(
        info=INFO,
        modules=(MODULE,),
        config={"hidden_size": 4, "rope": {"theta": 1e4}, "tie": True, "list": [1, None]},
        takes=("input_ids", "attention_mask"),
        takes_any=True,
        model_type="llama",
        vocab=5,
        positions=128,
        pad=1,
        attention="eager",
        tokenizer=TOKENIZER,
        source="def forward(self, x): ...",
    ),
    "ModelCard-2": m.ModelCard(
        info=INFO, modules=(MODULE,), generation={"eos_token_id": [2, 3], "temperature": 0.7}
    ),
    "Tables": m.Tables(data=b"\0\1\xfe\xff"),
    "SourceText": m.SourceText(
        digest=MARK,
        text="def forward(self, x):\n    return self.act(x)",
        operations=(("self_act_0", 1, "act"),),
        kin=("mlp", "other.mlp"),
        data=b"\0\xff",
    ),
    "Kept": m.Kept(number=3, name="<kept 0"),
    "Seat": m.Seat(
        id="s1",
        number=4,
        keeps=("<kept 0", "<grad 1"),
        uses={"c0": m.Kept(number=3, name="<kept 0")},
        drops=(m.Kept(number=1, name="<kept 2"),),
        same=DIGEST,
    ),
    "OpenSession": m.OpenSession(request_id="Req_9-i", model="tiny", fingerprint=MARK),
    "SessionInfo": m.SessionInfo(
        id="s1",
        state="closed",
        model="tiny",
        created=1.5,
        until=121.5,
        seconds=120.0,
        last=4,
        failed=((2, JOB),),
    ),
    "Submit-seat": m.Submit(
        protocol=1,
        request_id="s1-4",
        model="tiny",
        fingerprint=MARK,
        graph=Graph(()),
        inputs=LANGUAGE,
        seat=m.Seat(id="s1", number=4, uses={"c0": m.Kept(number=3, name="h")}, same=DIGEST),
    ),
    "Limits-session": m.Limits(
        body_bytes=1,
        constant_bytes=2,
        result_bytes=3,
        memory_bytes=4,
        flops=5,
        nodes=6,
        price_seconds=7.0,
        run_seconds=8.0,
        log_bytes=9,
        queued_jobs=10,
        new_tokens=11,
        stream_bytes=12,
        session_bytes=13,
    ),
    "Applied": m.Applied(data=b"\xff\0"),
    "Missing": m.Missing(digests=(DIGEST,)),
    "Tokens": m.Tokens(rows=((5, 7), ()), texts=("Paris", "")),
    "ModelInfo-memory": m.ModelInfo(
        id="tiny",
        family="language",
        class_name="LlamaForCausalLM",
        fingerprint="ab" * 32,
        dtype="float32",
        parameters=935_808,
        state="loading",
        pinned=False,
        host_bytes=1 << 27,
        device_bytes=1 << 31,
        need_bytes=1 << 28,
        need_device_bytes=1 << 32,
        weight_bytes=3_743_232,
        loaded_bytes=1_000_000,
        used=1_800_000_000.5,
    ),
    "ModelStatus-memory": m.ModelStatus(
        id="tiny",
        state="cold",
        waiting=2,
        running=0,
        host_bytes=5,
        device_bytes=6,
        used=1_800_000_000.5,
    ),
    "Deploy": m.Deploy(
        source="org/name",
        name="mine",
        pinned=True,
        dtype="bfloat16",
        attn_implementation="sdpa",
        device="cuda:1",
    ),
    "Evict": m.Evict(model="mine", forget=True),
    "Keep": m.Keep(seconds=86_400.0),
    "ModelStatus": m.ModelStatus(id="tiny", state="ready", waiting=2, running=1),
    "UsageRow": USED,
    "UsageList": m.UsageList(
        usage=(USED,), limits={"queued_jobs": 100.0}, weight=2.0, expires=1_800_000_000.5
    ),
    "EditInfo": m.EditInfo(name="upside-down", bytes=1632),
    "EditList": m.EditList(edits=(m.EditInfo(name="upside-down", bytes=1632),)),
    "ServerStatus": m.ServerStatus(
        version="0.2.0",
        seconds=12.5,
        models=(m.ModelStatus(id="tiny", state="ready", waiting=2, running=1),),
    ),
    "Health": m.Health(live=True, ready=False, parts={"checker": "loading"}),
    "ErrorReport": REPORT,
    "PriceInfo": PRICE,
    "ResultInfo": RESULT,
    "JobInfo": JOB,
    "JobInfo-2": replace(JOB, merged=True),
    "JobInfo-waiting": m.JobInfo(
        id="00x",
        state="queued",
        model="tiny",
        created=1_800_000_000.5,
        ahead=3,
        estimate=2.5,
        model_state="loading",
    ),
    "JobList": m.JobList(jobs=(JOB,)),
    "StateEvent": m.StateEvent(state="running", attempts=1),
    "LogEvent": m.LogEvent(text="norm tensor(1.5)\n"),
    "ValueEvent": m.ValueEvent(
        number=7,
        stream=1,
        value=Seq("tuple", (3, "step", Seq("list", (Ref(0), Name("float", "inf"))))),
        tensors=b"\0\xff",
    ),
    "ProgressEvent": m.ProgressEvent(done=3, total=12),
    "ProgressEvent-load": m.ProgressEvent(done=3 << 20, total=12 << 20, kind="load"),
    "EndEvent": m.EndEvent(job=JOB),
    "EndEvent-2": m.EndEvent(job=JOB, result=b"\x00\xffresult"),
    "Manifest": m.Manifest(
        saved=(("h", Seq("list", (Ref(0), Ref(2)))), ("n", Name("float", "nan"))),
        ended=SITE,
        protocol=1,
    ),
}
"""By the name of the message; further ones as `Name-2`."""
