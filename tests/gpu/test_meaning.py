"""Blocks on a model whose weights are on a GPU: to the bit what plain hooks give on that GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.gpu import place
from tests.gpu.place import DEVICE, IS_CUDA
from tests.language.hooks import with_hooks
from weft.errors import GuardError, WriteMismatchError
from weft.testing.same import bitwise, moves

pytestmark = pytest.mark.gpu

IDS = place.tokens(9)
ON = IDS.to(DEVICE)
AT = "transformer.h.1.output"
LAST = f"transformer.h.{zoo.LAYERS - 1}.output"


@pytest.fixture(scope="module")
def net():
    return place.net("gpt2")


@pytest.fixture
def model(net):
    return weft.LanguageModel(net)


@pytest.fixture(params=["cpu", "device"])
def v(request):
    """A direction of the user's, where he happens to have it."""
    vector = torch.linspace(-1, 1, 32)
    return vector if request.param == "cpu" else vector.to(DEVICE)


def logits_of(net, hooks=None):
    return with_hooks(net, hooks or {}, ON).result.logits


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [IDS, ON], ids=["ids on the cpu", "ids on the device"])
def test_reads_are_what_hooks_see_and_lie_where_the_model_is(model, net, ids):
    keys = [f"transformer.h.{n}.{port}" for n in range(3) for port in ("output", "input")]
    with model.trace(ids):
        got = [getattr(model.get(key.rpartition(".")[0]), key.rpartition(".")[2]) for key in keys]
        got = weft.save(got)
        logits = model.lm_head.output.save()
    seen = with_hooks(net, dict.fromkeys(keys), ON)
    assert all(one.device == DEVICE for one in got) or not IS_CUDA
    bitwise(list(got), [seen[key] for key in keys])
    bitwise(logits, seen.result.logits)


def test_a_list_of_prompts_of_different_lengths(model, net):
    rows = zoo.tokens(5, 9, 3)
    with model.trace(rows) as tracer:
        h = model.transformer.h[1].output.save()
        mask = tracer.mask
        lengths = tracer.lengths
    assert list(lengths) == [5, 9, 3]
    for number, row in enumerate(rows):
        alone = with_hooks(net, {AT: None}, torch.tensor([row], device=DEVICE))[AT]
        part = h[number, -len(row) :]
        assert float((part - alone[0]).abs().max()) < 1e-5 * float(alone.abs().max())
    assert mask.sum(-1).tolist() == [5, 9, 3]


# -- edits and what they are made of ---------------------------------------------------------------


def test_a_direction_is_added_wherever_it_lies(model, net, v):
    on = v.to(DEVICE)
    with model.trace(IDS):
        model.transformer.h[1].output[:, -1] += 2 * v
        logits = model.lm_head.output.save()

    def add(h):
        h[:, -1] += 2 * on

    expected = logits_of(net, {AT: add})
    moves(expected, logits_of(net))
    bitwise(logits, expected)


def test_a_direction_takes_a_sites_place(model, net, v):
    whole = v.expand(1, 9, 32).contiguous()
    with model.trace(IDS):
        model.transformer.h[1].output = whole
        logits = model.lm_head.output.save()
    on = whole.to(DEVICE)
    bitwise(logits, logits_of(net, {AT: lambda h: on.clone()}))


def test_tensors_on_both_sides_in_one_expression(model, net):
    here, there = torch.linspace(0, 1, 32), torch.linspace(2, 3, 32, device=DEVICE)
    with model.trace(IDS):
        h = model.transformer.h[1].output
        model.transformer.h[1].output = h * here + there
        logits = model.lm_head.output.save()
    on = here.to(DEVICE)
    bitwise(logits, logits_of(net, {AT: lambda h: h * on + there}))


@pytest.mark.parametrize("where", ["cpu", DEVICE], ids=["cpu", "device"])
def test_tensors_of_the_users_are_written_into(model, net, where):
    kept = torch.zeros(3, 9, 32, device=where)
    with model.trace(IDS):
        for number in range(3):
            kept[number] = model.transformer.h[number].output.squeeze(0)
    keys = [f"transformer.h.{n}.output" for n in range(3)]
    seen = with_hooks(net, dict.fromkeys(keys), ON)
    assert kept.device.type == torch.device(where).type
    bitwise(kept.to(DEVICE), torch.cat([seen[key] for key in keys]))


def test_new_tensors_are_made_where_the_model_runs(model, net):
    with model.trace(IDS):
        h = model.transformer.h[1].output
        mask = torch.arange(h.shape[1]) % 2 == 0
        new = torch.where(mask[None, :, None], h, torch.zeros(h.shape))
        model.transformer.h[1].output = new + torch.full((32,), 0.5) + torch.tensor([0.25])
        logits = model.lm_head.output.save()
        made = torch.ones(h.shape).save()
    even = torch.arange(9, device=DEVICE) % 2 == 0

    def change(h):
        return torch.where(even[None, :, None], h, torch.zeros_like(h)) + 0.5 + 0.25

    assert made.device == model.transformer.h[1].mlp.c_fc.weight.device
    bitwise(logits, logits_of(net, {AT: change}))


def test_hints_about_devices_change_nothing(model, net, v):
    with model.trace(IDS):
        h = model.transformer.h[1].output
        assert h.device == DEVICE or not IS_CUDA
        assert h.is_cuda == IS_CUDA
        moved = h.cpu().to(DEVICE) + v.to(h.device)
        model.transformer.h[1].output = moved.to("cuda" if IS_CUDA else "cpu")
        logits = model.lm_head.output.save()
    on = v.to(DEVICE)
    bitwise(logits, logits_of(net, {AT: lambda h: h + on}))


def test_a_wrong_shape_is_refused_at_the_users_line(model):
    with pytest.raises(WriteMismatchError), model.trace(IDS):
        model.transformer.h[1].output = torch.zeros(3, device=DEVICE)


# -- where results are -----------------------------------------------------------------------------


def test_results_go_where_they_are_asked_for(model, net):
    with model.trace(IDS, device="cpu") as tracer:
        h = model.transformer.h[1].output.save("h")
        several = weft.save({"a": [model.lm_head.output]})
    assert h.device.type == several["a"][0].device.type == "cpu"
    assert tracer.results["h"].device.type == "cpu"
    bitwise(h, with_hooks(net, {AT: None}, ON)[AT].cpu())


def test_a_cache_goes_where_it_is_asked_for(model, net):
    with model.trace(IDS) as tracer:
        cache = tracer.cache([model.transformer.h[1]], device="cpu", dtype=torch.float16)
    got = cache["transformer.h.1"].output
    assert got.device.type == "cpu"
    bitwise(got, with_hooks(net, {AT: None}, ON)[AT].half().cpu())


def test_what_is_saved_stays_when_the_model_goes_on(model, net):
    with model.trace(IDS):
        before = model.transformer.h[1].output.save()
        model.transformer.h[1].output[:] = 0
        after = model.transformer.h[1].output.save()
    bitwise(before, with_hooks(net, {AT: None}, ON)[AT])
    assert not after.any()


def test_a_model_that_is_moved_after_it_was_opened():
    net = zoo.build("gpt2")
    model = weft.LanguageModel(net)
    with model.trace(IDS):
        on_cpu = model.lm_head.output.save()
    net.to(DEVICE)
    with model.trace(IDS):
        moved = model.lm_head.output.save()
    assert moved.device == DEVICE or not IS_CUDA
    bitwise(moved, logits_of(net))
    net.to("cpu")
    with model.trace(IDS):
        back = model.lm_head.output.save()
    bitwise(back, on_cpu)


# -- the rest of the language ----------------------------------------------------------------------


def test_skip_stop_and_lens(model, net):
    with model.trace(IDS):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        lens = model.lm_head(model.transformer.ln_f(model.transformer.h[0].output)).save()
        logits = model.lm_head.output.save()
    seen = with_hooks(net, {"transformer.h.0.output": None}, ON)
    with torch.no_grad():
        expected = net.lm_head(net.transformer.ln_f(seen["transformer.h.0.output"]))
    bitwise(lens, expected)
    first = {}

    def note(h):
        first["h"] = h.clone()

    bitwise(
        logits,
        logits_of(net, {"transformer.h.0.output": note, AT: lambda h: first["h"].clone()}),
    )
    done = place.forwards(net.transformer.h[2])
    with model.trace(IDS) as tracer:
        model.transformer.h[0].output.save()
        tracer.stop()
    assert done() == [] and str(tracer.ended) == "transformer.h.0.output"


def test_looks_bring_numbers_from_the_device(model, net):
    expected = float(with_hooks(net, {AT: None}, ON)[AT].norm())
    with model.trace(IDS) as tracer:
        norm = model.transformer.h[1].output.norm()
        seen = norm.item()
        if norm > 0:
            model.transformer.h[1].output[:] *= 2
        logits = model.lm_head.output.save("logits")
    assert seen == expected
    bitwise(logits, logits_of(net, {AT: lambda h: h * 2}))
    again = tracer.graph.run(model, IDS)
    bitwise(again["logits"], logits)
    with pytest.raises(GuardError):
        tracer.graph.run(model, place.tokens(9, seed=8))


def test_draws_are_keyed_and_leave_the_devices_own_stream_alone(model):
    if IS_CUDA:
        before = torch.cuda.get_rng_state()

    def once(seed):
        with model.trace(IDS, seed=seed):
            h = model.transformer.h[1].output
            model.transformer.h[1].output = h + torch.randn_like(h)
            noise = (
                torch.rand_like(h),
                torch.randint_like(h, 9),
                torch.nn.functional.dropout(h, 0.5),
                torch.multinomial(h.squeeze(0).softmax(-1), 2),
                torch.bernoulli(h.sigmoid()),
                torch.normal(h, 1.0),
                torch.randn(h.shape),
            )
            noise = weft.save(noise)
            logits = model.lm_head.output.save()
        return [logits, *noise]

    one, same, other = once(3), once(3), once(4)
    bitwise(one, same)
    for a, b in zip(one, other, strict=True):
        assert not torch.equal(a, b)
    assert all(tensor.device == one[0].device for tensor in one)
    if IS_CUDA:
        assert one[0].is_cuda and torch.equal(before, torch.cuda.get_rng_state())


def test_edits_of_a_handle(model, net, v):
    with model.edit() as edited:
        model.transformer.h[1].output[:, -1] += v
    with edited.trace(IDS):
        logits = edited.lm_head.output.save()
    with model.trace(IDS):
        plain = model.lm_head.output.save()
    on = v.to(DEVICE)

    def add(h):
        h[:, -1] += on

    bitwise(logits, logits_of(net, {AT: add}))
    bitwise(plain, logits_of(net))


def test_edits_as_a_file(model, net, v, tmp_path):
    with model.edit() as edited:
        model.transformer.h[1].output[:, -1] += v
    edited.save_edits(tmp_path / "edits.weft")
    loaded = weft.LanguageModel(net).load_edits(tmp_path / "edits.weft")
    with edited.trace(IDS):
        one = edited.lm_head.output.save()
    with loaded.trace(IDS):
        other = loaded.lm_head.output.save()
    bitwise(one, other)


def test_loopback_gives_the_same(model, net, v):
    def once(remote):
        with model.trace(IDS, remote=remote, seed=2) as tracer:
            model.transformer.h[1].output[:, -1] += v
            h = model.transformer.h[2].output
            (h + torch.randn_like(h)).save("h")
            model.lm_head.output.save("logits")
        return tracer.results

    here, there = once(False), once("local")
    for name in ("h", "logits"):
        bitwise(there[name].cpu(), here[name].cpu())
    with model.trace(IDS, remote="local", device=DEVICE):
        back = model.lm_head.output.save()
    assert back.device == DEVICE or not IS_CUDA


def test_an_experiment_as_a_file_runs_on_the_device(model, net, tmp_path, v):
    with model.trace(IDS) as tracer:
        model.transformer.h[1].output[:, -1] += v
        model.lm_head.output.save("logits")
    tracer.graph.save(tmp_path / "one.weft")
    again = weft.Experiment.load(tmp_path / "one.weft").run(model, IDS)
    bitwise(again["logits"], tracer.results["logits"])


def test_attached_modules(model, net):
    torch.manual_seed(2)
    probe = nn.Linear(32, 32)
    model.transformer.h[1].probe = probe
    try:
        with model.trace(IDS):
            found = model.transformer.h[1].probe(model.transformer.h[1].output)
            model.transformer.h[1].output = found
            logits = model.lm_head.output.save()
    finally:
        del model.transformer.h[1].probe
    on = nn.Linear(32, 32).to(DEVICE)
    on.load_state_dict(probe.state_dict())
    bitwise(logits, logits_of(net, {AT: on}))


def test_eager_blocks_have_numbers(model, net, v):
    with model.trace(IDS, eager=True):
        h = model.transformer.h[1].output
        assert abs(float(h.norm()) - float(with_hooks(net, {AT: None}, ON)[AT].norm())) == 0
        model.transformer.h[1].output[:, -1] += v
        logits = model.lm_head.output.save()
    on = v.to(DEVICE)

    def add(h):
        h[:, -1] += on

    bitwise(logits, logits_of(net, {AT: add}))


def test_logs_print_numbers_of_the_device(model, capsys):
    with model.trace(IDS) as tracer:
        tracer.log("norm", model.transformer.h[1].output.norm())
        tracer.log("rows", model.transformer.h[1].output)
    said = capsys.readouterr().out
    assert said.startswith("norm ") and "cuda" not in said
