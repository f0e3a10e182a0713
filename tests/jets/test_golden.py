"""microgpt against a reference run made with the public code of the paper (arXiv 2604.07328): 20 documents, one a step.

`golden/microgpt.npz`: tokens (-1: none) of 20 documents and 3 queries, initial parameters, the direction `psi` (document i
has weight 1 - z psi[i]), and at 40 entries the trained parameters: as series in z to degree 4, with all documents, and
without documents 3, 7 and 11. All in double precision; losses of the queries likewise.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from leaveout.jets import Space, install, restore
from leaveout.training.loop import PaperAdam
from leaveout.training.microgpt import MicroGPT
from oracles.agreement import TOLERANCES

GOLDEN = {
    name: torch.from_numpy(a) for name, a in np.load(Path(__file__).parents[1] / "golden" / "microgpt.npz").items()
}
ROWS = [row[row >= 0].long() for row in GOLDEN["tokens"]]
DOCUMENTS, QUERIES = ROWS[:20], ROWS[20:]
ENTRIES = GOLDEN["entries"].long()


def loss_of(model, row):
    return F.cross_entropy(model(row[None, :-1])[0], row[1:])


def fresh(dtype):
    model = MicroGPT().to(dtype)
    vector_to_parameters(GOLDEN["init"].clone().to(dtype), model.parameters())
    return model


def train(model, weights):
    """One document a step, learning rate 0.01 falling linearly to 0; weights[i] multiplies the loss of document i."""
    optimizer = PaperAdam(model.parameters())
    for step, (row, weight) in enumerate(zip(DOCUMENTS, weights, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / len(DOCUMENTS))
        optimizer.zero_grad()
        (loss_of(model, row) * weight).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("name", "without"), [("plain", ()), ("without", (3, 7, 11))])
def test_training_is_that_of_the_reference(name, without):
    model = train(fresh(torch.float64), [float(i not in without) for i in range(20)])
    found = parameters_to_vector(model.parameters()).detach()[ENTRIES]
    losses = torch.stack([loss_of(model, query) for query in QUERIES]).detach()
    assert (found - GOLDEN[name]).abs().max() <= 1e-12 and (losses - GOLDEN[f"loss_{name}"]).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_series_are_those_of_the_reference(dtype):
    space = Space(4, 1, dtype)
    model = fresh(space.real_dtype)
    replaced = install(model, {name: space.constant(p) for name, p in model.named_parameters()})
    higher = torch.zeros(20, 4, 1, dtype=dtype)
    higher[:, 0, 0] = -GOLDEN["psi"].to(dtype)
    train(model, [space.jet(torch.ones(()), h) for h in higher])
    series = torch.cat([p.coefficients()[:, 0].reshape(5, -1) for p in model.parameters()], 1)[:, ENTRIES].detach()
    losses = torch.stack([loss_of(model, query).coefficients()[:, 0] for query in QUERIES]).detach()
    restore(model, replaced)
    for found, wanted in ((series, GOLDEN["coefficients"]), (losses.T, GOLDEN["loss_coefficients"].T)):
        scale = 1.0 if dtype == torch.complex128 else wanted.abs().amax(1, keepdim=True)
        assert ((found - wanted) / scale).abs().max() <= TOLERANCES["exact" if dtype == torch.complex128 else "single"]
