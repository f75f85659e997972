"""Trains the tiny model of `weft.testing` from scratch and writes its folder.

A fixed number of steps on one CPU thread and one seed: the same machine and versions give the same
weights. 5,000 steps take twelve minutes on an idle core. Prints a table of progress, measured on
128 prompts of each kind; its last row is measured on 256, on the files as written.

    python scripts/train_tiny.py --steps 5000 --out src/weft/testing/tiny
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import astuple, fields
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from weft.testing import corpus, tiny_path
from weft.testing.evaluate import Scores, evaluate

ROWS, LENGTH = 32, 48
PEAK_RATE, LAST_SHARE, WARM_UP = 3e-3, 0.05, 100
REPORT_EVERY = 200

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the tiny model knows the roles user and assistant, not ' "
    "+ message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def main() -> None:
    """Reads the command line, trains, writes."""
    parser = argparse.ArgumentParser(description="Trains the tiny model of weft.testing.")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(tiny_path()))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    tokenizer, model = make_tokenizer(), LlamaForCausalLM(make_config())
    train(model, tokenizer, options.steps, options.seed)
    write(model, tokenizer, options.out)
    written = AutoModelForCausalLM.from_pretrained(options.out)
    print_row("as written", evaluate(written, AutoTokenizer.from_pretrained(options.out)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the corpus; the punctuation stands alone."""
    ids = {word: i for i, word in enumerate(corpus.vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token=corpus.UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(corpus.WORD), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, ids[corpus.BOS])]
    )
    # Spaces between words and none before punctuation: no word begins with the prefix.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        pad_token=corpus.PAD,
        unk_token=corpus.UNK,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT],
        padding_side="left",
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def make_config() -> LlamaConfig:
    """Four layers of four heads, 128 wide, untied."""
    return LlamaConfig(
        vocab_size=len(corpus.vocabulary()),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=corpus.SPECIAL.index(corpus.PAD),
        bos_token_id=corpus.SPECIAL.index(corpus.BOS),
        eos_token_id=corpus.SPECIAL.index(corpus.EOS),
        dtype="float32",
    )


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """AdamW with warm-up and a cosine to a twentieth of the peak rate; prints as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    began, shown = time.monotonic(), 0.0
    print("step", "seconds", "loss", *(field.name for field in fields(Scores)), sep=" | ")
    for step, batch in enumerate(islice(batches(seed), steps), start=1):
        loss = batch_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown += loss.item() / REPORT_EVERY
        if step % REPORT_EVERY == 0:
            label = f"{step} | {time.monotonic() - began:.0f} | {shown:.3f}"
            print_row(label, evaluate(model, tokenizer, n=128))
            shown = 0.0


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (LAST_SHARE + (1 - LAST_SHARE) * cosine)


def batches(seed: int) -> Iterator[Tensor]:
    """Token ids of the training rows, `[row, pos]`, without end."""
    ids = {word: i for i, word in enumerate(corpus.vocabulary())}
    stream = corpus.rows(seed, LENGTH)
    while True:
        yield torch.tensor([[ids[word] for word in row] for row in islice(stream, ROWS)])


def batch_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean next-token loss over rows of ids, `[row, pos]`."""
    logits = model(ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half precision on disk; the configuration says float32, so it loads and runs in that."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes it for the owner alone
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def print_row(label: str, scores: Scores) -> None:
    """One line of the table."""
    print(label, *(f"{value:.3f}" for value in astuple(scores)), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
