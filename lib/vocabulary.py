"""Log-probabilities of next tokens without the (positions, vocabulary) matrix of logits.
lib/fast.py puts FastVocabulary into a model."""

import torch

from lib.tensors import stamp

SPARE = 8  # columns of the packed product besides the model's: the shift's, and zeros for alignment
ROWS, COLUMNS = 512, 4096  # positions and tokens whose logits are held at a time: 8 MB of float32
KEPT = 1 << 26  # exponentials kept for backward on a CPU, where W trains: 256 MB of float32


class NextLogprobs(torch.autograd.Function):
    """h (M, C), W (V, C) of one dtype, target (M,) -> log softmax(h W^T)[target] (M,) float32.

    Neither direction holds (M, V): the logits of ROWS positions and COLUMNS tokens at a time
    stay in cache and become exponentials in place; sums are rescaled when a larger logit comes
    (Milakov and Gimelshein 2018, arXiv 1805.02867). If W is frozen, the gradient of h,
    W[target] - softmax(h W^T) W, is computed while they are in cache; if W trains, backward
    recomputes them, but for a batch so small that KEPT holds them all. packed: Packed of W^T in
    such pieces, plus a row of ones (see packed_vocabulary)."""

    @staticmethod
    def forward(ctx, h, W, target, packed=None):
        now = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        keep = ctx.needs_input_grad[1] and h.device.type == 'cpu' and len(h) * len(W) <= KEPT
        out, ctx.kept = h.new_empty(len(h), dtype=torch.float32), []  # kept: of each piece
        grad, tops, totals = torch.empty_like(h) if now else None, [], []
        for piece, part, shift, rest in NextLogprobs.pieces(h, W, target):
            top, total = torch.zeros_like(rest), torch.zeros_like(rest)
            mean, kept = torch.zeros_like(part, dtype=torch.float32), []
            for columns, x in NextLogprobs.logits(part, W, shift, packed):
                higher = torch.maximum(top, x.amax(1, keepdim=True))
                shrink, top = (top - higher).exp_(), higher
                e = x.sub_(top).exp_()
                total = total * shrink + e.sum(1, keepdim=True)
                if now:
                    mean = mean.mul_(shrink).add_(e.to(h.dtype) @ W[columns])
                kept += [(columns, e, top)] * keep
            out[piece] = (rest - top - total.log()).squeeze(1)
            if now:
                grad[piece] = W[target[piece]] - mean / total
            tops.append(top)
            totals.append(total)
            ctx.kept += [kept] * keep
        saved = [grad] if now else [h, W, target, torch.cat(tops), torch.cat(totals)]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def pieces(h, W, target):
        """Yield slice, its h (m, C), shift (m, 1), and the target's logit - shift (m, 1) float32.
        GPT-2's logits are near -100, where bfloat16 numbers are 0.5 apart. Softmax ignores a shift:
        with the target's logit subtracted within the product, before it is rounded, the target has
        no error and another token's is at most 1/256 of its distance."""
        rows = ROWS * (1 if h.device.type == 'cpu' else 8)  # more at a time on a GPU
        for start in range(0, len(h), rows):
            piece = slice(start, start + rows)
            exact = (h[piece].float() * W[target[piece]].float()).sum(1, keepdim=True)
            shift = exact.to(h.dtype)
            yield piece, h[piece], shift, exact - shift.float()

    @staticmethod
    def logits(h, W, shift, packed):
        """Yield slice of the vocabulary, its h W^T - shift in float32."""
        size = COLUMNS * (1 if h.device.type == 'cpu' else 4)
        for start in range(0, len(W), size):
            columns = slice(start, start + size)
            if packed is None:
                x = torch.addmm(-shift, h, W[columns].t())
            else:
                x = torch.cat((h, -shift, h.new_zeros(len(h), SPARE - 1)), 1)
                x = packed[start // COLUMNS].product(x)
            yield columns, x.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # g (M,)
        if len(ctx.saved_tensors) == 1:
            (grad,) = ctx.saved_tensors
            return g[:, None].to(grad.dtype) * grad, None, None, None
        h, W, target, tops, totals = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, []  # a second backward pass computes them again
        dh = W[target].float() * g[:, None]  # summed in float32: bfloat16 would round 13 times
        dW = torch.zeros_like(W, dtype=torch.float32)
        dW.index_add_(0, target, h.float() * g[:, None])
        for i, (piece, part, shift, _) in enumerate(NextLogprobs.pieces(h, W, target)):
            last, scale = tops[piece], -g[piece, None] / totals[piece]
            logits = NextLogprobs.logits(part, W, shift, None)
            again = ((columns, x.sub_(last).exp_(), last) for columns, x in logits)
            for columns, e, top in kept[i] if kept else again:
                e = (e * ((top - last).exp() * scale)).to(h.dtype)
                dh[piece] += e @ W[columns]
                dW[columns] += e.t() @ part
        return dh.to(h.dtype), dW.to(W.dtype), None, None


def packed_vocabulary(W, matrix):
    """wte (V, C) -> COLUMNS of W^T each, packed, plus a row of ones, so that the shift is part
    of the product, and rows of zeros."""
    W = torch.cat((W.detach().t(), W.new_ones(1, len(W)), W.new_zeros(SPARE - 1, len(W))))
    return [matrix(piece, backward=False) for piece in W.split(COLUMNS, dim=1)]


class FastVocabulary:
    """Takes the place of GPT.next_logprobs, in autocast's precision."""

    def __init__(self, model, matrix=None):
        """matrix: Packed if the vocabulary is frozen and can be packed, else None."""
        self.model, self.matrix = model, matrix
        self.packed, self.of = None, None  # and what it was made of

    def __call__(self, h, target, scored):  # (B, T, C), (B, T), (B, T) -> (B, T)
        kind, W = h.device.type, self.model.wte.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if torch.compiler.is_compiling() or 'next_logits' in vars(self.model):  # another one
            return type(self.model).next_logprobs(self.model, h, target, scored)
        packs = self.matrix and not W.requires_grad  # it may have begun to train
        if packs and self.of != stamp(W):
            self.packed, self.of = packed_vocabulary(W, self.matrix), stamp(W)
        packed = self.packed if packs else None
        with torch.autocast(kind, enabled=False):
            W = (W if torch.is_grad_enabled() else W.detach()).to(dtype)
            if kind != 'cpu':  # boolean indexing would synchronize
                out = NextLogprobs.apply(h.flatten(0, 1).to(dtype), W, target.flatten(), None)
                return out.view(target.shape).where(scored, 0.0)
            out = torch.zeros(target.shape, device=h.device)
            out[scored] = NextLogprobs.apply(h[scored].to(dtype), W, target[scored], packed)
            return out
