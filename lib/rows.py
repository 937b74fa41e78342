"""Full fine-tuning of the rows of wte that the training texts use. lib/fast.py attaches it."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class TrainedRows:
    """Takes the place of wte.forward and of its parameter: only the rows of `ids` train, as the
    parameter `wte.rows` (u, C). The other rows would get no gradient and no decay, so AdamW would
    not change them; texts use few of the 50,257 rows, which are a third of GPT-2 124M.
    state_dict() has wte.weight as always."""

    def __init__(self, wte, ids):
        self.wte, weight = wte, wte.weight.requires_grad_(False)
        self.ids = torch.from_numpy(np.unique(ids)).to(weight.device, torch.int64)
        self.place = torch.full((len(weight),), -1, device=weight.device)  # id -> row
        self.place[self.ids] = torch.arange(len(self.ids), device=weight.device)
        self.rows = nn.Parameter(weight.detach()[self.ids])
        wte.register_parameter('rows', self.rows)
        wte.forward = self
        wte.register_state_dict_pre_hook(self.write_back)
        wte.register_state_dict_post_hook(self.leave_out)

    def __call__(self, ids):  # (B, T) -> (B, T, C)
        place = self.place[ids]
        if self.wte.training:  # these are among self.ids
            return F.embedding(place, self.rows)
        trained = F.embedding(place.clamp(min=0), self.rows)
        return torch.where((place >= 0)[..., None], trained, F.embedding(ids, self.wte.weight))

    def write_back(self, *_):
        self.wte.weight.data[self.ids] = self.rows.detach()

    @staticmethod
    def leave_out(module, state, prefix, metadata):
        del state[prefix + 'rows']
