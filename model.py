"""GPT-2 in plain PyTorch, with the names and the weight layout of OpenAI's checkpoints.

Shapes in the comments: B texts, T tokens of the longest one, C width, H heads, V vocabulary,
K classes, N prompt vectors. Everything can be computed by this file alone; lib/fast.py replaces
parts by faster ones of the same values."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils import checkpoint

from lib import checkpoints
from lib.tensors import check_tensors


@dataclass
class Config:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024  # positions
    vocab_size: int = 50257  # GPT-2's tokens; 257 = bytes and <|endoftext|>, the demo's


SHAPES = {
    'gpt2': Config(12, 12, 768),  # 124M
    'gpt2-medium': Config(24, 16, 1024),  # 350M
    'gpt2-large': Config(36, 20, 1280),  # 774M
    'gpt2-xl': Config(48, 25, 1600),  # 1558M
    'distilgpt2': Config(6, 12, 768),  # 82M
    'nano': Config(4, 4, 128, 256, 257),  # 0.9M, bytes: the demo's (lib/nano)
}
PIECE = 512  # positions whose next-token logits are held at a time: 103 MB of float32


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """No random init: every weight is loaded or drawn by init_weights. (On the meta device a
        draw would import torch._dynamo, 1 s.)"""


class Head(nn.Linear):
    def reset_parameters(self):
        """No random init, like Embedding."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv1D(nn.Module):
    """y = x W + b with W stored (in, out), as OpenAI does; nn.Linear stores (out, in)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):  # (..., in) -> (..., out)
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)  # queries, keys, values
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)
        self.attn_drop, self.resid_drop = nn.Dropout(0.0), nn.Dropout(0.0)  # see GPT.set_dropout

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # (B, H, T, C/H) each
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        # Pads are on the right and attention is causal: no token sees a pad, no mask is needed.
        p = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = Conv1D(4 * cfg.n_embd, cfg.n_embd)
        self.resid_drop = nn.Dropout(0.0)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        # GPT-2 was trained with the tanh form of GELU; the exact one moves the logits by 1e-3.
        x = F.gelu(self.c_fc(x), approximate='tanh')  # (B, T, 4C)
        return self.resid_drop(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=1e-5)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=1e-5)
        self.mlp = MLP(cfg)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), a classifier and a language model at once.

    num_labels > 0 adds the class head `score`, linear without bias as in transformers'
    GPT2ForSequenceClassification. The language model's head is tied to wte. The weights come from
    from_pretrained() or init_weights()."""

    def __init__(self, cfg, num_labels=0):
        super().__init__()
        self.cfg, self.num_labels = cfg, num_labels
        self.wte = Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=1e-5)
        if num_labels:
            self.score = Head(cfg.n_embd, num_labels, bias=False)
        # lora.py: learned vectors in front of every text, (N, C), or (K, N, C) with classes
        self.register_parameter('prompt', None)
        self.pooling, self.pad_to = 'last', 0  # what pool() reads; 'pad': texts are pad_to long
        self.classes = 0  # K > 0: LoRA or prompt of K classes; every text is read K times

    @property
    def end(self):
        """Id of <|endoftext|>, the last of the vocabulary: the empty text, and padding."""
        return self.cfg.vocab_size - 1

    def embed(self, ids, y=None, copies=1):
        """ids (B, T) int64 -> input of the first block (copies B, N + T, C). y (B,): see
        token_logprobs. The residual stream is float32 in every precision."""
        x = self.wte(ids).float().repeat(copies, 1, 1)  # (copies B, T, C)
        if self.prompt is not None:
            if y is not None:
                prompt = self.prompt[y]
            elif self.classes:  # one copy of the texts for each class
                prompt = self.prompt.repeat_interleave(len(ids), 0)
            else:
                prompt = self.prompt.expand(len(ids), -1, -1)
            x = torch.cat((prompt, x), dim=1)
        assert x.shape[1] <= self.cfg.block_size, 'callers cut texts to the block size'
        return self.drop(x + self.wpe.weight[: x.shape[1]])

    def hidden(self, ids, y=None):
        """ids (B, T) int64, padded on the right -> final states (B, T, C), without those of the
        prompt; of a model with K classes (K B, T, C), class by class, each with its slice."""
        copies = 1 if y is not None else self.classes or 1
        x = self.embed(ids, y, copies)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)[:, x.shape[1] - ids.shape[1] :]

    def pool(self, x, lengths):
        """x (B, T, C), lengths (B,) -> the state of each text that the head reads (B, C), found by
        length, never by id: so the logits do not depend on the padding (except with 'pad')."""
        if self.pooling == 'first':  # under a causal mask it has seen one token
            return x[:, 0]
        if self.pooling == 'pad':  # the last position, a pad in all but the longest texts
            return x[:, -1]
        if self.pooling == 'mean':
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (B, T)
            return (x * real[..., None]).sum(1) / lengths[:, None]
        return x[torch.arange(len(x), device=x.device), lengths - 1]

    def padded(self, ids):
        """ids (B, T) -> (B, pad_to) with 'pad', else as they are."""
        missing = self.pad_to - ids.shape[1] if self.pooling == 'pad' else 0
        return F.pad(ids, (0, missing), value=self.end)

    def classify(self, ids, lengths):
        """ids (B, T) int64 padded on the right, lengths (B,) int64 >= 1 -> logits (B, K)."""
        return self.score(self.pool(self.hidden(self.padded(ids)), lengths))

    def forward(self, ids, lengths):
        return self.classify(ids, lengths)

    def token_logprobs(self, ids, lengths, ends, context=(), first=None, y=None):
        """log p of every token of every text, in nats.

        ids (B, T) int64 padded on the right, lengths (B,) int64 >= 1.  ends (B,) bool: the text
        ends where its ids end, so the <|endoftext|> after it is scored as well.  context: ids
        between the leading <|endoftext|> and the text, not scored.  first (B,): first token to
        score (default 0).  y (B,): score each text under the prompt of class y only.
        -> (B, T + 1) float32, or (K, B, T + 1) with K classes: column t is
        log p(token t | <|endoftext|>, context, tokens before t), column lengths[b] that of the
        final <|endoftext|>; 0 where nothing is scored."""
        B, T = ids.shape
        target = F.pad(ids, (0, 1))  # (B, T + 1)
        target[torch.arange(B, device=ids.device), lengths] = self.end
        column = torch.arange(T + 1, device=ids.device)
        scored = column < (lengths + ends)[:, None]  # (B, T + 1)
        if first is not None:
            scored &= column >= first[:, None]
        start = [ids.new_full((B, 1), token) for token in (self.end, *context)]
        h = self.hidden(torch.cat((*start, ids), 1), y)[:, len(context) :]  # (B, T + 1, C)
        if self.classes and y is None:  # (K B, T + 1, C)
            target, scored = (t.repeat(self.classes, 1) for t in (target, scored))
            return self.next_logprobs(h, target, scored).view(self.classes, B, T + 1)
        return self.next_logprobs(h, target, scored)

    def next_logits(self, h):
        """h (M, C) final states -> logits of the next token (M, V), in float32, because GPT-2's are
        near -100, where bfloat16 numbers are 0.5 apart."""
        return F.linear(h.float(), self.wte.weight.float())

    def next_logprobs(self, h, target, scored):
        """h (B, T, C) final states, target (B, T) int64, scored (B, T) bool -> log p(target)
        (B, T) float32, 0 where not scored. In pieces that backward recomputes, so that (B, T, V) is
        never held."""

        def of_piece(h, target):  # (M, C), (M,) -> (M,)
            return -F.cross_entropy(self.next_logits(h), target, reduction='none')

        pieces = zip(h[scored].split(PIECE), target[scored].split(PIECE))
        with torch.autocast(h.device.type, enabled=False):
            found = [checkpoint.checkpoint(of_piece, *p, use_reentrant=False) for p in pieces]
        return torch.zeros(target.shape, device=h.device).masked_scatter(scored, torch.cat(found))

    def logprob(self, ids, lengths, ends, context=(), first=None, y=None):
        """log P(text), the sum of token_logprobs -> (B,) float32 nats, or (B, K) with K classes."""
        return self.token_logprobs(ids, lengths, ends, context, first, y).sum(-1).t()

    def set_dropout(self, p):
        """Set GPT-2's own dropout (embedding, attention, residual) to probability p."""
        self.drop.p = p
        for m in self.modules():
            if isinstance(m, Attention):
                m.attn_drop.p = m.resid_drop.p = p
            if isinstance(m, MLP):
                m.resid_drop.p = p

    def init_weights(self, generator=None, only=None):
        """Draw random weights as GPT-2 does: normal with std 0.02, residual projections divided by
        sqrt(2 n_layer), biases 0. LayerNorms, and whatever else an edit adds, start as their
        classes say. only: names of the weights to draw (default: all). -> self"""
        for name, m in self.named_modules():
            if isinstance(m, (Conv1D, Embedding, Head)) and (not only or f'{name}.weight' in only):
                std = 0.02 / math.sqrt(2 * self.cfg.n_layer) if name.endswith('c_proj') else 0.02
                nn.init.normal_(m.weight, 0.0, std, generator=generator)
                if getattr(m, 'bias', None) is not None:
                    nn.init.zeros_(m.bias)
        return self

    @classmethod
    def from_pretrained(cls, where, num_labels=0, new_head=False, data_dir=None):
        """Load 'gpt2' or another name of SHAPES, or a folder with model.safetensors (in shards or
        not) or pytorch_model.bin. -> GPT in float32; the weights are memory-mapped, read lazily.

        num_labels: rows of the class head, 0 = none.  new_head: draw a fresh head (std 0.02) even
        if the file has one; parameters that an edit of this file adds to GPT-2 then start as their
        classes say, unless the file has them.  Raises UserError that lists every tensor that is
        missing, unexpected or of the wrong shape; never loads partially."""
        folder = checkpoints.model_folder(where, data_dir)
        tensors = checkpoints.folder_tensors(folder)
        if new_head or not num_labels:  # an edit's head may have other names than score.weight
            tensors = {n: t for n, t in tensors.items() if not n.startswith('score.')}
        cfg = Config(**checkpoints.read_config(folder, tensors, where, SHAPES))
        with torch.device('meta'):
            model = cls(cfg, num_labels)
        buffers = dict(model.named_buffers(remove_duplicate=False))  # an edit may repeat a block
        named = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
        first = {}  # {id of a tensor: its first name}: an edit may share one
        same = {n: first.setdefault(id(t), n) for n, t in named.items()}
        if 'lm_head.weight' not in named:  # an edit may untie it
            checkpoints.drop_tied_head(tensors, folder)
        if new_head and 'score.weight' in named:  # not in a head of an edit
            tensors['score.weight'] = torch.empty(named['score.weight'].shape).normal_(0.0, 0.02)
        tensors = {**{n: tensors[f] for n, f in same.items() if f in tensors}, **tensors}
        may_lack = named if new_head else buffers  # of what an edit added
        added = {n for n in may_lack if n not in tensors and not checkpoints.NAMES.fullmatch(n)}
        shapes = {n: t.shape for n, t in named.items() if n not in added}
        headless = 'score.weight' in shapes.keys() - tensors.keys()
        misfit = f'{folder} does not hold a GPT-2 of {cfg} as in model.py'
        check_tensors(tensors, shapes, misfit + ' (new_head=True draws a head)' * headless)
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
        if added or checkpoints.has_plain_tensors(model):
            model = cls(cfg, num_labels).init_weights(only=added)
            tensors.update({n: t for n, t in model.state_dict().items() if n in added})
        once = {n: nn.Parameter(tensors[n], False) for n in first.values() if n not in buffers}
        tensors.update({n: once[f] for n, f in same.items() if f in once})
        model.load_state_dict(tensors, strict=True, assign=True)  # which keeps the model's flags
        return model
