"""`mptbook`, with a fault in the batches at given places of the order of the data.

    python faulty.py nan|loss|always PLACES mptbook's arguments...

`nan` makes one gradient NaN, `loss` multiplies the loss by 50; PLACES are numbers with commas.
`always` is `loss` from the first of PLACES on, whatever the batch.
"""

import sys

from mptbook.__main__ import main
from mptbook.data import loader
from mptbook.model.mpt import MPT

kind, places, *arguments = sys.argv[1:]
places = {int(place) for place in places.split(",")}
now, hooks = [], []
row_numbers, loss_of = loader.row_numbers, MPT.loss


def noted(domains, batch_rows, seed, step, mixture):
    now[:] = [step]
    return row_numbers(domains, batch_rows, seed, step, mixture)


def faulty(model, *batch):
    for hook in hooks:
        hook.remove()
    hooks.clear()
    loss = loss_of(model, *batch)
    at_fault = now[0] >= min(places) if kind == "always" else now[0] in places
    if not (model.training and at_fault):
        return loss
    if kind == "nan":
        weight = model.transformer.norm_f.weight
        hooks.append(weight.register_hook(lambda grad: grad * float("nan")))
        return loss
    return 50 * loss


loader.row_numbers, MPT.loss = noted, faulty
sys.exit(main(arguments))
