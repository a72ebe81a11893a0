"""Mirror of `flash_attn.models.bert`: BERT out of the blocks of this package.

With config.use_flash_attn a batch with padding runs packed, and its padding comes back as zeros.
A config is any object with the attributes of transformers' BertConfig; those that are read beside
them, and may be missing: use_flash_attn, fused_bias_fc, fused_mlp, fused_dropout_add_ln,
last_layer_subset, dense_seq_output, pad_vocab_size_multiple, use_xentropy, mlp_checkpoint_lvl,
position_embedding_type and rotary_emb_*.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._core.ground.dtypes import widened
from ..bert_padding import index_first_axis, index_first_axis_residual, pad_input, unpad_input
from ..errors import ArgumentError, UnsupportedError, printable
from ..losses.cross_entropy import CrossEntropyLoss
from ..modules.block import Block
from ..modules.embedding import BertEmbeddings
from ..modules.mha import MHA
from ..modules.mlp import FusedMLP, Mlp
from ..ops.fused_dense import FusedDense
from ..ops.triton.layer_norm import layer_norm_fn
from ..utils.pretrained import state_dict_from_pretrained
from ._bert_checkpoint import fit_prefix, inv_remap_state_dict, remap_state_dict
from ._bert_checks import as_mask, check_first, check_labelled, check_labels
from ._bert_config import check_config
from ._bert_encoder import BertEncoder, create_block, create_mixer_cls, create_mlp_cls
from ._bert_heads import (
    BertLMPredictionHead,
    BertPooler,
    BertPredictionHeadTransform,
    BertPreTrainingHeads,
    normed,
)
from ._bert_outputs import BertForPreTrainingOutput, BertModelOutput
from ._config_values import padded_size

__all__ = [
    "MHA",
    "BertEmbeddings",
    "BertEncoder",
    "BertForPreTraining",
    "BertLMPredictionHead",
    "BertModel",
    "BertPooler",
    "BertPreTrainedModel",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "Block",
    "CrossEntropyLoss",
    "FusedDense",
    "FusedMLP",
    "Mlp",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "index_first_axis",
    "index_first_axis_residual",
    "inv_remap_state_dict",
    "layer_norm_fn",
    "logger",
    "pad_input",
    "remap_state_dict",
    "state_dict_from_pretrained",
    "unpad_input",
]

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound="BertPreTrainedModel")
_TRUNK = re.compile(r"(bert\.)?(embeddings|emb_ln|encoder)\.")
"""What no checkpoint of a BERT lacks; pooler and heads may be new."""


def _init_weights(module: nn.Module, initializer_range: float = 0.02) -> None:
    """Draw the weights of a linear layer or an embedding; biases and padding become zero."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return
    nn.init.normal_(module.weight, std=initializer_range)
    if isinstance(module, nn.Linear):
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


class BertPreTrainedModel(nn.Module):
    """What the models share: `config`, and the loading of a checkpoint.

    Args:
        config: as the module says; further arguments are taken and not used.

    Raises:
        ArgumentTypeError: config lacks attributes.
        UnsupportedError: config asks for a decoder, cross-attention or relative positions.

    Contract: flash-attention 2.8, `BertPreTrainedModel`. Wider: a config of any class. Stricter:
    what upstream would ignore is refused.
    """

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        check_config(config)
        self.config = config

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        model_name: str | os.PathLike[str],
        config: Any,
        *inputs: Any,
        **kwargs: Any,
    ) -> _Model:
        """The model with the weights of a Hugging Face checkpoint.

        Args:
            model_name: a folder, or a name on the hub: see `state_dict_from_pretrained`.
            config: with inputs and kwargs, the arguments of the class.

        A pooler or heads that the checkpoint lacks keep their random weights, with a warning.

        Raises:
            ArgumentError: the checkpoint lacks embeddings or layers, or sizes differ.
            UnsupportedError: as `remap_state_dict` and `state_dict_from_pretrained`.

        Contract: flash-attention 2.8, `BertPreTrainedModel.from_pretrained`. Different: what
        lacks parts of the encoder is refused. Wider: `BertModel` loads names with "bert.".
        """
        model = cls(config, *inputs, **kwargs)
        names = model.state_dict().keys()
        state = fit_prefix(remap_state_dict(state_dict_from_pretrained(model_name), config), names)
        missing = sorted(names - state.keys())
        _require_trunk(model_name, [name for name in missing if _TRUNK.match(name)])
        if missing:
            told = printable(", ".join(missing))
            logger.warning("%s lacks, so they are random: %s", printable(model_name), told)
        left = sorted(state.keys() - names)
        logger.info("not used of %s: %s", printable(model_name), left)
        model.load_state_dict(state, strict=False)
        return model


class BertModel(BertPreTrainedModel):
    """Embeddings, encoder and pooler.

    Args:
        config: as the module says; its vocab_size is rounded up to pad_vocab_size_multiple.
        add_pooling_layer: whether there is a pooler.

    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedError: config asks for what there is not.

    Contract: flash-attention 2.8, `BertModel`.
    """

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        # whoever reads config.vocab_size afterwards means the width of the logits
        if config.vocab_size != padded_size(config):
            config.vocab_size = padded_size(config)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)
        self.embeddings = BertEmbeddings(
            config.hidden_size,
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
        )
        self.emb_drop = nn.Dropout(config.hidden_dropout_prob)
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_tokens_mask: Tensor | None = None,
    ) -> BertModelOutput:
        """Encode.

        Args:
            input_ids, token_type_ids: (batch, seqlen).
            position_ids: (batch, seqlen) or (seqlen,); 0, 1, 2, ... if None.
            attention_mask: (batch, seqlen), bool or integers, nonzero for a token.
            masked_tokens_mask: (batch, seqlen) bool, True for the tokens that are wanted.

        Returns:
            An output of transformers, or without it a named tuple: last_hidden_state,
            (batch, seqlen, hidden_size), or with masked_tokens_mask (total, hidden_size), those of
            its tokens that are no padding, row by row; pooler_output, (batch, hidden_size), None
            without a pooler.

        Raises:
            ArgumentError: a mask has another shape or is floating; attention_mask masks the first
                token, which is to be pooled, beside masked_tokens_mask; or as
                `BertEncoder.forward`.

        Contract: flash-attention 2.8, `BertModel.forward`. Wider: integers for attention_mask,
        and no transformers.
        """
        hidden = self.embeddings(input_ids, position_ids, token_type_ids)
        hidden = self.emb_drop(normed(self.emb_ln, hidden, self.fused_dropout_add_ln))
        mask = as_mask("attention_mask", attention_mask, hidden)
        wanted = as_mask("masked_tokens_mask", masked_tokens_mask, hidden)
        if wanted is None:
            sequence = self.encoder(hidden, key_padding_mask=mask)
            pooled = None if self.pooler is None else self.pooler(sequence)
            return BertModelOutput(last_hidden_state=sequence, pooler_output=pooled)
        first = torch.zeros_like(wanted)
        first[:, :1] = True
        subset = wanted | first if mask is None else (wanted | first) & mask
        sequence = self.encoder(hidden, key_padding_mask=mask, subset_mask=subset)
        pooled = None
        if self.pooler is not None:
            chosen = sequence[first[subset]]
            check_first(chosen, first.shape[0])
            pooled = self.pooler(chosen, pool=False)
        return BertModelOutput(last_hidden_state=sequence[wanted[subset]], pooler_output=pooled)


class BertForPreTraining(BertPreTrainedModel):
    """`BertModel` with the heads and losses of its pretraining.

    Args:
        config: as for `BertModel`. dense_seq_output: logits of the tokens with a label alone.
            last_layer_subset, which needs it: the last layer runs on these alone, too, if
            use_flash_attn has padding to leave out. use_xentropy: `CrossEntropyLoss`, whose
            backward writes over the logits.

    Raises:
        ArgumentError: last_layer_subset without dense_seq_output.
        UnsupportedError: a decoder that is not tied to the word embeddings.

    Contract: flash-attention 2.8, `BertForPreTraining`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dense_seq_output = getattr(config, "dense_seq_output", False)
        self.last_layer_subset = getattr(config, "last_layer_subset", False)
        if self.last_layer_subset and not self.dense_seq_output:
            raise ArgumentError(
                "config.last_layer_subset",
                "True without dense_seq_output",
                "both or none",
                "set dense_seq_output=True",
            )
        if not getattr(config, "tie_word_embeddings", True):
            raise UnsupportedError(
                "config.tie_word_embeddings",
                False,
                "True",
                "take the model of transformers for a decoder with weights of its own",
            )
        loss: Callable[..., nn.Module] = nn.CrossEntropyLoss
        if getattr(config, "use_xentropy", False):
            loss = partial(CrossEntropyLoss, inplace_backward=True)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.mlm_loss = loss(ignore_index=0)
        self.nsp_loss = loss(ignore_index=-1)
        self.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the decoder's weight that of the word embeddings."""
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> BertForPreTrainingOutput:
        """Logits, and the loss if both labels are given.

        Args:
            input_ids, position_ids, token_type_ids, attention_mask: as `BertModel.forward`.
            labels: (batch, seqlen) int64, the word that stood here, 0 where none was masked. It
                is 0 that is ignored here, not -100.
            next_sentence_label: (batch,) int64, 0 or 1; -1 is ignored.

        Returns:
            An output of transformers, or without it a named tuple: loss, the sum of both losses in
            float32 at least, or None;
            prediction_logits, (batch, seqlen, vocab_size), with dense_seq_output and labels
            (total, vocab_size) of the tokens whose label is positive, row by row;
            seq_relationship_logits, (batch, 2).

        Raises:
            ArgumentError: as `BertModel.forward`, or labels on padding with last_layer_subset.

        Contract: flash-attention 2.8, `BertForPreTraining.forward`. Wider: no transformers.
        """
        wanted = None
        if labels is not None:
            check_labels(labels, input_ids)
            wanted = labels > 0 if self.dense_seq_output else None
        subset = wanted if self.last_layer_subset else None
        outputs = self.bert(input_ids, position_ids, token_type_ids, attention_mask, subset)
        sequence = outputs.last_hidden_state
        if wanted is not None and labels is not None:
            chosen = wanted.flatten().nonzero().flatten()
            labels = labels.flatten()[chosen]
            if subset is None:
                sequence = index_first_axis(sequence.flatten(0, 1), chosen)
            check_labelled(labels, sequence)
        scores, relationship = self.cls(sequence, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            words = self.mlm_loss(scores.flatten(0, -2), labels.flatten())
            sentences = self.nsp_loss(relationship, next_sentence_label.flatten())
            loss = widened(words) + widened(sentences)
        return BertForPreTrainingOutput(
            loss=loss, prediction_logits=scores, seq_relationship_logits=relationship
        )


def _require_trunk(model_name: str | os.PathLike[str], missing: list[str]) -> None:
    if missing:
        raise ArgumentError(
            "model_name",
            f"{os.fspath(model_name)}, which lacks {len(missing)} parameters: "
            f"{', '.join(missing[:4])}",
            "a checkpoint with the embeddings and all layers of config",
            "pass the config of the checkpoint",
        )
