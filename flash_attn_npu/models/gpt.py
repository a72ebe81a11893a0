"""Mirror of `flash_attn.models.gpt`: GPT models out of the modules of this package.

The models are defined here; the layers they are built of in `_gpt_blocks`, what is read from a
config in `_gpt_config`, tensor parallel checkpoints in `_gpt_shards`, and those of Hugging Face in
`_gpt_pretrained`, `_gpt2_names` and the module of each family. Clients replace names of this
module, and every use of them looks them up here, at call time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .._core.ground.arguments import require_tensors
from ..modules.block import Block, ParallelBlock
from ..modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
from ..modules.mha import MHA, ParallelMHA
from ..modules.mlp import FusedMLP, GatedMlp, Mlp, ParallelFusedMLP, ParallelGatedMlp, ParallelMLP
from ..ops.activations import sqrelu_fwd
from ..ops.fused_dense import ColumnParallelLinear, fused_dense_func
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from ..utils.distributed import (
    all_gather,
    all_gather_raw,
    get_dim_for_local_rank,
    sync_shared_params,
)
from ..utils.generation import GenerationMixin
from ..utils.pretrained import state_dict_from_pretrained
from ._config_values import padded_size
from ._gpt2_names import remap_state_dict_hf_gpt2, with_late_norms
from ._gpt_blocks import (
    CausalLMOutput,
    _init_weights,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
    first_weights,
    make_norm,
    mark_shared,
    refuse_parts,
    scattered,
    share_tables,
)
from ._gpt_config import Sizes, check_config, positions
from ._gpt_pretrained import GPTPreTrainedModel
from ._gpt_shards import combine_state_dicts_tp, shard_state_dict_tp
from .bigcode import remap_state_dict_hf_bigcode
from .falcon import remap_state_dict_hf_falcon
from .gpt_neox import remap_state_dict_hf_gpt_neox
from .gptj import remap_state_dict_hf_gptj
from .llama import remap_state_dict_hf_llama
from .opt import remap_state_dict_hf_opt

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..utils.generation import InferenceParams

__all__ = [
    "MHA",
    "Block",
    "ColumnParallelLinear",
    "FusedMLP",
    "GPT2Embeddings",
    "GPTLMHeadModel",
    "GPTModel",
    "GPTPreTrainedModel",
    "GatedMlp",
    "GenerationMixin",
    "Mlp",
    "ParallelBlock",
    "ParallelFusedMLP",
    "ParallelGPT2Embeddings",
    "ParallelGatedMlp",
    "ParallelMHA",
    "ParallelMLP",
    "RMSNorm",
    "_init_weights",
    "all_gather",
    "all_gather_raw",
    "combine_state_dicts_tp",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "get_dim_for_local_rank",
    "layer_norm_fn",
    "logger",
    "remap_state_dict_hf_bigcode",
    "remap_state_dict_hf_falcon",
    "remap_state_dict_hf_gpt2",
    "remap_state_dict_hf_gpt_neox",
    "remap_state_dict_hf_gptj",
    "remap_state_dict_hf_llama",
    "remap_state_dict_hf_opt",
    "shard_state_dict_tp",
    "sqrelu_fwd",
    "state_dict_from_pretrained",
    "sync_shared_params",
]

logger = logging.getLogger("flash_attn_npu")


class GPTModel(GPTPreTrainedModel):
    """Embeddings, layers and the last norm of a GPT.

    Args:
        config: any object with the attributes of transformers' GPT2Config. Others that count:
            pad_vocab_size_multiple, word_embed_proj_dim, n_head_kv, rotary_emb_fraction,
            rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, use_alibi, window_size,
            use_flash_attn, qkv_proj_bias, out_proj_bias, attn_dwconv, fused_bias_fc,
            activation_function (also "gelu_approx", "sqrelu", "glu", "swiglu", "geglu"), fused_mlp,
            mlp_fc1_bias, mlp_fc2_bias, mlp_multiple_of, mlp_checkpoint_lvl, rms_norm, prenorm,
            parallel_block, parallel_block_tied_norm, fused_dropout_add_ln, residual_in_fp32,
            sequence_parallel, and mup_width_scale, mup_embeddings_multiplier, mup_attn_multiplier
            and mup_scale_qk_dot_by_d. max_position_embeddings of 0 means no embedding of positions.
        process_group: the ranks that share it; None for one process.
        device, dtype: of the parameters.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: what the config asks for excludes each
            other, or is not there.

    Contract: flash-attention 2.8, `GPTModel`.
    """

    def __init__(
        self,
        config: Any,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        found = check_config(config, process_group is not None)
        self.process_group = process_group
        self.sequence_parallel = scattered(config)
        self.prenorm = getattr(config, "prenorm", True)
        self.parallel_block = getattr(config, "parallel_block", False)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.embeddings_multiplier = getattr(config, "mup_embeddings_multiplier", 1.0)
        self.embeddings = self._embed_with(config, found, device, dtype)
        self.layers = nn.ModuleList(
            create_block(config, index, process_group, device, dtype)
            for index in range(found.layers)
        )
        share_tables(self.layers)
        if self.prenorm:
            self.drop_f = nn.Dropout(config.resid_pdrop)
            self.ln_f = make_norm(config, found.hidden, device, dtype)
            if process_group is not None:
                mark_shared(self.ln_f, self.sequence_parallel)
        self.apply(first_weights(config, found.layers))
        self.tie_weights()

    def _embed_with(
        self,
        config: Any,
        found: Sizes,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> nn.Module:
        rows = (found.hidden, padded_size(config), positions(config))
        if self.process_group is None:
            width = getattr(config, "word_embed_proj_dim", None)
            return GPT2Embeddings(*rows, word_embed_proj_dim=width, device=device, dtype=dtype)
        return ParallelGPT2Embeddings(
            *rows,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
            device=device,
            dtype=dtype,
        )

    def tie_weights(self) -> None:
        """Give all ranks the same norms; nothing to do without a process_group."""
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The cache of each layer, by its number: see `MHA.allocate_inference_cache`.

        Contract: flash-attention 2.8, `GPTModel.allocate_inference_cache`.
        """
        layers: Any = self.layers
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(layers)
        }

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            input_ids: (batch, seqlen), the same in every rank.
            position_ids: (batch, seqlen) or (seqlen,), of the embedding of positions; 0, 1, 2, ...
                if None. Rotary embedding and ALiBi count by themselves.
            inference_params: an `InferenceParams`: the caches of the layers.

        Returns:
            (batch, seqlen, hidden_size); over a process_group with config.sequence_parallel this
            rank's part of (batch * seqlen, hidden_size).

        Raises:
            ArgumentError: input_ids are not of two dimensions, or inference_params come with
                sequence_parallel.

        Contract: flash-attention 2.8, `GPTModel.forward`.
        """
        require_tensors(input_ids=input_ids)
        parts = self.process_group is not None and self.sequence_parallel
        refuse_parts(parts and inference_params is not None, "inference_params")
        flat: dict[str, Any] = {"combine_batch_seqlen_dim": True} if parts else {}
        hidden = self.embeddings(input_ids, position_ids=position_ids, **flat)
        if self.embeddings_multiplier != 1.0:
            hidden = hidden * self.embeddings_multiplier
        options: dict[str, Any] = {"seqlen": input_ids.shape[1]} if parts else {}
        if inference_params is not None:
            options["inference_params"] = inference_params
        second = residual = None
        for layer in self.layers:
            if self.parallel_block:
                hidden, second, residual = layer(hidden, second, residual, mixer_kwargs=options)
            elif self.prenorm:
                hidden, residual = layer(hidden, residual, mixer_kwargs=options)
            else:
                hidden = layer(hidden, mixer_kwargs=options)
        return self._last(hidden, second, residual) if self.prenorm else hidden

    def _last(self, hidden: Tensor, second: Tensor | None, residual: Tensor | None) -> Tensor:
        """The norm of the sum of all."""
        norm: Any = self.ln_f
        if self.fused_dropout_add_ln:
            out: Tensor = layer_norm_fn(
                hidden,
                norm.weight,
                norm.bias,
                residual=residual,
                x1=second,
                eps=norm.eps,
                dropout_p=self.drop_f.p if self.training else 0.0,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
            return out
        total = self.drop_f(hidden)
        if residual is not None:
            total = residual + total
        if second is not None:
            total = total + self.drop_f(second)
        normed: Tensor = norm(total.to(dtype=norm.weight.dtype))
        return normed


class GPTLMHeadModel(GPTPreTrainedModel, GenerationMixin):
    """`GPTModel` and the logits of the next token.

    Args:
        config: as for `GPTModel`. Others that count: tie_word_embeddings (True if missing),
            lm_head_bias, norm_head (the rows of the head's weight are normalised),
            mup_output_multiplier (logits are scaled by it and mup_width_scale, not so their bias).
        process_group, device, dtype: as for `GPTModel`.

    Contract: flash-attention 2.8, `GPTLMHeadModel`.
    """

    def __init__(
        self,
        config: Any,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        found = check_config(config, process_group is not None)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.transformer = GPTModel(config, process_group=process_group, **place)
        self.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        self.norm_head = getattr(config, "norm_head", False)
        self.output_scale = getattr(config, "mup_output_multiplier", 1.0) * getattr(
            config, "mup_width_scale", 1.0
        )
        narrow = getattr(config, "word_embed_proj_dim", None)
        width = found.hidden if narrow is None else narrow
        self.project_out = (
            None if narrow is None else nn.Linear(found.hidden, width, bias=False, **place)
        )
        bias = getattr(config, "lm_head_bias", False)
        self.lm_head: Any
        if process_group is None:
            self.lm_head = nn.Linear(width, padded_size(config), bias=bias, **place)
        else:
            self.lm_head = ColumnParallelLinear(
                width,
                padded_size(config),
                process_group,
                bias=bias,
                sequence_parallel=scattered(config),
                **place,
            )
        self.apply(first_weights(config, found.layers))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head use the embeddings of words if they are tied, and ranks the same norms."""
        if self.tie_word_embeddings:
            embeddings: Any = self.transformer.embeddings
            self.lm_head.weight = embeddings.word_embeddings.weight
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """See `GPTModel.allocate_inference_cache`.

        Contract: flash-attention 2.8, `GPTLMHeadModel.allocate_inference_cache`.
        """
        return self.transformer.allocate_inference_cache(
            batch_size, max_seqlen, dtype=dtype, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
    ) -> CausalLMOutput:
        """Run the model.

        Args:
            input_ids, position_ids, inference_params: as for `GPTModel.forward`.
            num_last_tokens: return logits of that many last positions alone; 0 for all.

        Returns:
            `.logits` (batch, seqlen, vocab_size), vocab_size rounded up to
            config.pad_vocab_size_multiple. Over a process_group they are this rank's part of the
            vocabulary, for a loss that knows it, unless inference_params are given; with
            config.sequence_parallel (batch * seqlen, part).

        Raises:
            ArgumentError: as `GPTModel.forward`, and num_last_tokens with sequence_parallel.

        Contract: flash-attention 2.8, `GPTLMHeadModel.forward`.
        """
        parts = self.process_group is not None and self.transformer.sequence_parallel
        refuse_parts(parts and num_last_tokens > 0, "num_last_tokens")
        hidden = self.transformer(input_ids, position_ids, inference_params)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if self.output_scale != 1.0:
            hidden = hidden * self.output_scale
        logits = self._logits(hidden)
        if self.process_group is not None and inference_params is not None:
            gathered, _ = all_gather_raw(logits, self.process_group)
            logits = gathered.unflatten(0, (-1, logits.shape[0])).movedim(0, -2).flatten(-2)
        return CausalLMOutput(logits)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.lm_head
        if not self.norm_head:
            logits: Tensor = head(hidden)
            return logits
        weight = F.normalize(head.weight)
        if self.process_group is None:
            return F.linear(hidden, weight, head.bias)
        options = {"process_group": self.process_group, "sequence_parallel": head.sequence_parallel}
        return fused_dense_func(hidden, weight, head.bias, **options)  # type: ignore[no-any-return]

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> Any:
        """As in nn.Module; checkpoints that have ln_0 in place of ln_f are understood.

        Contract: flash-attention 2.8, `GPTLMHeadModel.load_state_dict`.
        """
        return super().load_state_dict(with_late_norms(state_dict), strict=strict)
