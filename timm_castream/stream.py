"""The CA-Stream: one query in cross attention with the feature map of every stage of a network.

"CA-Stream: Attention-based pooling for interpretable image recognition", https://arxiv.org/abs/2404.14996.
Here are the cross attention of eq. (6), its PROJ -> CA variant (supplementary eq. 1) and the stream of eq. (10).
Letters: B images, C classes, D channels, H x W locations, h heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_TYPES = ('ca', 'proj_ca')
INITS = ('paper', 'gap')


def _locations(features: Tensor) -> Tensor:
    """F as in the paper, (B, H * W, D): a view of (B, D, H, W) in either memory format.

    Permuted before it is flattened: flattened first, torch.compile copies a map that convolutions made channels_last
    into a contiguous one.
    """
    return features.permute(0, 2, 3, 1).flatten(1, 2)


class CrossAttention(nn.Module):
    """One step of the stream, q_{l+1} = W_l CA_l(q_l, F_l): eq. (6) and eq. (10).

    CA_l(q, F) = F^T softmax(F q / sqrt(D)), with F of shape (H * W, D). Under ``block='proj_ca'`` the keys are F W^K
    and the values F W^V (supplementary eq. 1). Neither is computed at every location: F W^K q = F (W^K q), and the
    attention weights of a location are scalars, so W^V applies to the one pooled vector.

    With several heads each attends with its own D / h channels; the scale stays 1 / sqrt(D), as in the authors' code.

    Args:
        dim: D, channels of the stage's feature map and entries of the incoming query.
        out_dim: Entries of the outgoing query.
        num_heads: h, must divide ``dim``.
        block: ``'ca'`` or ``'proj_ca'``.
        drop: Dropout rate of the attention weights and of the outgoing query, in [0, 1].
        bias: Whether the linear layers have biases.

    Raises:
        ValueError: If ``block`` is unknown, ``num_heads`` does not divide ``dim`` or ``drop`` is no rate.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int = 1,
        block: str = 'ca',
        drop: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if block not in BLOCK_TYPES:
            raise ValueError(f'block {block!r} is unknown, valid ones: {", ".join(map(repr, BLOCK_TYPES))}.')
        if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
            raise ValueError(f'num_heads must be a positive int, got {num_heads!r}.')
        if dim % num_heads:
            raise ValueError(f'num_heads {num_heads!r} does not divide the {dim} channels of a stage.')
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0.0 <= drop <= 1.0:
            raise ValueError(f'drop {drop!r} is no rate, valid ones: 0 to 1.')
        self.dim = dim
        self.num_heads = num_heads
        self.scale = dim**-0.5
        dd = {'device': device, 'dtype': dtype}
        self.key = nn.Linear(dim, dim, bias=bias, **dd) if block == 'proj_ca' else None
        self.value = nn.Linear(dim, dim, bias=bias, **dd) if block == 'proj_ca' else None
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim, out_dim, bias=bias, **dd)
        self.proj_drop = nn.Dropout(drop)
        for linear in (self.key, self.value, self.proj):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)

    def keys(self, features: Tensor) -> Tensor:
        """What the query is compared with at every location: F, or F W^K. The stream itself never computes it.

        Args:
            features: (B, D, H, W).

        Returns:
            (B, D, H, W).
        """
        return features if self.key is None else self.key(features.movedim(1, -1)).movedim(-1, 1)

    def attention_logits(self, query: Tensor, features: Tensor) -> Tensor:
        """F q for every location, before the scale and the softmax: a class agnostic CAM with weights q, eq. (5).

        Args:
            query: (B, D).
            features: (B, D, H, W), in any memory format.

        Returns:
            (B, h, H * W).
        """
        # Each head's query is padded with zeros to all D channels: slicing a channels_last map by heads would copy it.
        if self.num_heads > 1:
            query = query.unflatten(1, (self.num_heads, -1)).transpose(1, 2).diag_embed(dim1=1, dim2=2).flatten(2)
        else:
            query = query.unsqueeze(1)
        offset = None
        if self.key is not None:
            if self.key.bias is not None:
                offset = (query * self.key.bias).sum(-1, keepdim=True)
            query = F.linear(query, self.key.weight.t())
        logits = torch.bmm(query, _locations(features).transpose(1, 2))
        return logits if offset is None else logits + offset

    def attention(self, query: Tensor, features: Tensor) -> Tensor:
        """Attention weights: the softmax over the locations of ``attention_logits / sqrt(D)``.

        Args:
            query: (B, D).
            features: (B, D, H, W), in any memory format.

        Returns:
            (B, h, H * W) in float32 or wider, each head of each image summing to 1.
        """
        # Scaled before the product, which float16 may be too narrow for; a softmax over 50,000 locations certainly is.
        logits = self.attention_logits(query * self.scale, features)
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def forward(self, query: Tensor, features: Tensor, attention: Tensor | None = None) -> Tensor:
        """The next query.

        Args:
            query: (B, D).
            features: (B, D, H, W), in any memory format.
            attention: What ``attention(query, features)`` returned, where the caller has it already.

        Returns:
            (B, out_dim).
        """
        if attention is None:
            attention = self.attention(query, features)
        weights = self.attn_drop(attention.to(features.dtype))
        pooled = torch.bmm(weights, _locations(features))  # (B, h, D)
        if self.value is not None:
            values = F.linear(pooled, self.value.weight)
            # The bias of every location, weighted: the weights sum to 1 unless dropout took some.
            pooled = values if self.value.bias is None else values + weights.sum(-1, keepdim=True) * self.value.bias
        if self.num_heads > 1:  # of each head its own channels
            pooled = pooled.unflatten(2, (self.num_heads, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)
        else:
            pooled = pooled.squeeze(1)
        return self.proj_drop(self.proj(pooled))


class CAStream(nn.Module):
    """The stream of eq. (10): q_0 is learnable, every stage makes the next query, the last one is the pooled vector.

    State-dict keys: ``cls_token`` and ``blocks.{i}.proj.weight|bias`` (W_i), ``blocks.{i}.key|value.*`` under
    ``'proj_ca'``.

    Args:
        dims: Channels d_l of the stages that the stream visits, in order. The pooled vector has as many entries as the
            last.
        num_classes: None for one q_0, or the number of classes for a class specific stream, with one q_0 a class.
        num_heads: Attention heads, must divide each of ``dims``.
        block: ``'ca'``, eq. (6), or ``'proj_ca'``, supplementary eq. (1).
        drop: Dropout rate; none in the last block, as in the authors' code.
        bias: Whether the linear layers have biases.
        init: ``'paper'``: Xavier-uniform W_l, q_0 from N(1, 1). ``'gap'``: a function-preserving initialisation. The
            last query is zero, the last attention is therefore uniform, and W_L is the identity: the pooled vector is
            the average of the last feature map. Training starts at W_L and W_{L-1}; the other weights have gradients
            from the second step on. Weight decay pulls W_L away from the identity.

    Raises:
        ValueError: If an argument does not fit, naming the value and the valid ones.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int | None = None,
        num_heads: int = 1,
        block: str = 'ca',
        drop: float = 0.0,
        bias: bool = True,
        init: str = 'paper',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f'init {init!r} is unknown, valid ones: {", ".join(map(repr, INITS))}.')
        if not dims:
            raise ValueError('A stream needs at least one stage, dims is empty.')
        if num_classes is not None and num_classes < 1:
            raise ValueError(f'num_classes {num_classes!r} leaves a class specific stream without a q_0.')
        self.dims = tuple(dims)
        self.init = init
        self.class_specific = num_classes is not None
        self.cls_token = nn.Parameter(torch.empty(1, dims[0], device=device, dtype=dtype))
        last = len(dims) - 1
        self.blocks = nn.ModuleList(
            CrossAttention(
                dim, dims[min(i + 1, last)], num_heads, block, drop if i < last else 0.0, bias, device, dtype
            )
            for i, dim in enumerate(dims)
        )
        self.reset_cls_token(1 if num_classes is None else num_classes)
        if init == 'gap':
            self._preserve_function()

    def reset_cls_token(self, num_classes: int) -> None:
        """Makes a new q_0, one row a class, on the same device and in the same dtype.

        It is drawn from N(1, 1), or zero where ``init='gap'`` and the first block is the last.
        """
        token = self.cls_token
        self.cls_token = nn.Parameter(token.new_empty(num_classes, token.shape[1]), requires_grad=token.requires_grad)
        nn.init.normal_(self.cls_token, mean=1.0, std=1.0)
        if self.init == 'gap' and len(self.blocks) == 1:
            nn.init.zeros_(self.cls_token)

    def _preserve_function(self) -> None:
        """The start of ``init='gap'``. A class specific or multi-head stream pools the average too."""
        last: CrossAttention = self.blocks[-1]  # type: ignore[assignment]
        for linear in (last.proj, last.value):
            if linear is not None:
                nn.init.eye_(linear.weight)
        zeros: list[Tensor | None] = [last.proj.bias, None if last.value is None else last.value.bias]
        if len(self.blocks) > 1:
            before: CrossAttention = self.blocks[-2]  # type: ignore[assignment]
            zeros += [before.proj.weight, before.proj.bias]
        for parameter in zeros:
            if parameter is not None:
                nn.init.zeros_(parameter)

    def initial_query(self, batch_size: int, labels: Tensor | None = None) -> Tensor:
        """q_0 for a batch.

        Args:
            batch_size: B.
            labels: (B,) class indices, for a class specific stream only.

        Returns:
            (B, D_0).

        Raises:
            ValueError: If a class specific stream gets no labels.
        """
        if self.class_specific:
            if labels is None:
                raise ValueError('A class specific stream needs labels: each class has its own q_0.')
            return self.cls_token[labels]
        return self.cls_token.expand(batch_size, -1)

    def step(self, index: int, query: Tensor, features: Tensor, attention: list[Tensor] | None = None) -> Tensor:
        """One step of eq. (10): q_{l+1} from q_l and F_l.

        Args:
            index: l, counted from the first stage of the stream, or from the last one if negative.
            query: q_l, (B, D_l).
            features: F_l, (B, D_l, H_l, W_l), in any memory format.
            attention: A list that receives the attention of this stage, (B, h, H_l, W_l), or None.

        Returns:
            q_{l+1}, (B, D_{l+1}).
        """
        block: CrossAttention = self.blocks[index]  # type: ignore[assignment]
        if attention is None:
            return block(query, features)
        weights = block.attention(query, features)
        attention.append(weights.unflatten(2, features.shape[2:]))
        return block(query, features, weights)

    def forward(self, features: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        """The pooled vector, q_{L+1}: eq. (10) from the first stage to the last.

        Args:
            features: The feature maps of the stages in order, each (B, D_l, H_l, W_l), in any memory format.
            labels: (B,) class indices, for a class specific stream only.

        Returns:
            (B, D_L).
        """
        query: Tensor | None = None
        for index, stage in zip(range(len(self.blocks)), features, strict=True):
            query = self.initial_query(stage.shape[0], labels) if query is None else query
            query = self.step(index, query, stage)
        assert query is not None  # dims is never empty
        return query
