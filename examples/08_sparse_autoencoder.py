"""A sparse autoencoder of one's own: trained on activations, then put in their place.

It is a plain module of yours. In a block it is applied to the model's stream as to any tensor: its
operations are recorded, also for a server, which never sees the module itself.
"""

import torch
from torch import nn

from weft import LanguageModel
from weft.testing import tiny_path
from weft.testing.corpus import facts

LAYER, WIDTH, STEPS = 1, 256, 60
PROMPT = "The capital of France is"


class Autoencoder(nn.Module):
    """d_model -> WIDTH features, few of which are on -> d_model."""

    def __init__(self, d_model):
        super().__init__()
        self.encoder = nn.Linear(d_model, WIDTH)
        self.decoder = nn.Linear(WIDTH, d_model)

    def encode(self, x):
        return self.encoder(x).relu()

    def forward(self, x):
        return self.decoder(self.encode(x))


torch.manual_seed(0)
model = LanguageModel(tiny_path())
layer = model.model.layers[LAYER]

prompts = [one.text for one in facts()[::4] if "capital" in one.text]
acts = []
for prompt in prompts:
    with model.trace(prompt):
        acts.append(layer.output.flatten(0, 1).save())
acts = torch.cat(acts)  # [tokens, d_model]

sae = Autoencoder(acts.shape[-1])
optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
losses = []
for _ in range(STEPS):
    features = sae.encode(acts)
    loss = (sae.decoder(features) - acts).square().mean() + 1e-4 * features.abs().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

sae.requires_grad_(False)
with model.trace(PROMPT):
    features = sae.encode(layer.output).save()  # [1, pos, WIDTH]
    layer.output = sae(layer.output)
    spliced = model.lm_head.output[0, -1].save()

strongest = features[0, -1].argmax()
with model.trace(PROMPT):
    stream = layer.output
    features_now = sae.encode(stream)
    rest = stream - sae.decoder(features_now)  # what the autoencoder does not explain
    features_now[:, -1, strongest] = 0
    layer.output = sae.decoder(features_now) + rest
    ablated = model.lm_head.output[0, -1].save()

if __name__ == "__main__":
    on = (features > 0).float().sum(-1).mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {on:.0f} of {WIDTH} features are on")
    print("with the autoencoder in place:", model.tokenizer.decode(spliced.argmax()))
    print("without its strongest feature:", model.tokenizer.decode(ablated.argmax()))
