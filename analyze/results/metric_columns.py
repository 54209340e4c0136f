"""The columns of the tables `layers` and `overall`."""

import pyarrow as pa

from mlsae.analyze.results.columns import Column

_F, _I, _L = pa.float64(), pa.int64(), pa.int32()
_FVU = "Σ‖x − x̂‖² / Σ‖x − μ‖² over eligible rows, μ their mean in each channel"
_PUBLISHED = "Σ‖x − x̂‖² / Σ(x − μ)² over eligible rows, μ one scalar, their mean over all channels"
_IN = "over unflagged rows at every position"
_OUT = "over unflagged rows at positions from 1"
_CE = "null where no transformer was at hand"
_SPLICED = (
    f"cross-entropy with the reconstruction of this layer's live activations spliced in; {_CE}"
)
_FROM_SPLICED = (
    f"over next tokens predicted from a spliced token alone; {_CE}, or there is no such token"
)
_HARMLESS = f"{_CE}, or the ablation costs nothing"

_COUNTS = (
    Column("num_rows", _I, "row", "eligible rows evaluated"),
    Column("num_rows_position_0_in", _I, "row", "unflagged rows evaluated, every position"),
    Column("num_rows_position_0_out", _I, "row", "unflagged rows evaluated, positions from 1"),
)

_ROWS = (
    Column("fvu", _F, "1", f"{_FVU}; null if the rows do not vary"),
    Column("fvu_published", _F, "1", _PUBLISHED),
    Column("fvu_position_0_in", _F, "1", f"as fvu, {_IN}"),
    Column("fvu_published_position_0_in", _F, "1", f"as fvu_published, {_IN}"),
    Column("fvu_position_0_out", _F, "1", f"as fvu, {_OUT}"),
    Column("fvu_published_position_0_out", _F, "1", f"as fvu_published, {_OUT}"),
    Column("explained_variance", _F, "1", "1 − fvu"),
    Column("mse", _F, "activation²", "Σ‖x − x̂‖² / (num_rows · d_model)"),
    Column("cosine", _F, "1", "mean of ⟨x, x̂⟩ / (‖x‖ · ‖x̂‖), 0 where either is 0"),
    Column(
        "relative_reconstruction_bias",
        _F,
        "1",
        "Σ‖x̂‖² / Σ⟨x, x̂⟩; below 1 reconstructions are too small; null if the divisor is not "
        "above its rounding",
    ),
    Column("l0", _F, "latent", "mean number of active latents of a row"),
    Column("l1", _F, "latent value", "mean sum of the latents' values of a row"),
    Column("density", _F, "1", "l0 / number of latents"),
)

_SHARES = (
    Column("dead_fraction", _F, "1", "share of the latents that are active at none of the rows"),
    Column("frequent_fraction", _F, "1", "share active at over a tenth of the rows"),
    Column("always_on_fraction", _F, "1", "share active at every row"),
)

_STORE = (
    Column(
        "norm", _F, "activation", "mean ‖x‖ over all eligible rows of the store, not the evaluated"
    ),
    Column(
        "adjacent_cosine",
        _F,
        "1",
        "mean over the evaluated eligible rows of the cosine of x − μ with x′ − μ′, x′ the row's "
        "activation at the next layer that the store holds, μ the mean of all eligible rows of the "
        "store; 0 where either is 0; null where the SAE does not read that layer, or no row varies",
    ),
    Column(
        "adjacent_cosine_pooled",
        _F,
        "1",
        "pooled cosine with the next layer that the store holds, over all its eligible rows: "
        "Σ⟨x − μ, x′ − μ′⟩ / √(Σ‖x − μ‖² · Σ‖x′ − μ′‖²); null at the last layer of the store, or "
        "where a layer does not vary",
    ),
)

_PCA_TEXT = (
    "as training measured it on the same held-out rows; null where others are evaluated, or "
    "training did not"
)
_PCA = (
    Column(
        "fvu_pca",
        _F,
        "1",
        f"fvu of the leading principal directions of training rows, {_PCA_TEXT}",
    ),
    Column("pca_directions", _I, "direction", f"principal directions of fvu_pca, {_PCA_TEXT}"),
)

_TOKENS = (
    Column("num_ce_tokens", _I, "token", f"scored next tokens of the columns below; {_CE}"),
    Column(
        "num_ce_tokens_spliced",
        _I,
        "token",
        f"scored next tokens that are predicted from a spliced token; {_CE}",
    ),
)

_ENTROPY = (
    Column("ce", _F, "nat/token", f"cross-entropy of the untouched transformer; {_CE}"),
    Column(
        "ce_store",
        _F,
        "nat/token",
        f"cross-entropy with this layer's stored activations spliced in; {_CE}, or the store keeps "
        "only some positions",
    ),
    Column("ce_sae", _F, "nat/token", _SPLICED),
    Column("delta_ce", _F, "nat/token", f"ce_sae − ce; {_CE}"),
    Column(
        "ce_zero",
        _F,
        "nat/token",
        "cross-entropy with zeros in this layer's place at every token, special ones and position "
        f"0 too; {_CE}",
    ),
    Column(
        "ce_zero_eligible",
        _F,
        "nat/token",
        f"cross-entropy with zeros in this layer's place at eligible tokens; {_CE}",
    ),
    Column(
        "ce_mean",
        _F,
        "nat/token",
        "cross-entropy with the mean of the store's eligible rows in this layer's place at "
        f"eligible tokens; {_CE}",
    ),
    Column("loss_recovered_zero", _F, "1", f"(ce_zero − ce_sae) / (ce_zero − ce); {_HARMLESS}"),
    Column(
        "loss_recovered_zero_eligible",
        _F,
        "1",
        f"(ce_zero_eligible − ce_sae) / (ce_zero_eligible − ce); {_HARMLESS}",
    ),
    Column("loss_recovered_mean", _F, "1", f"(ce_mean − ce_sae) / (ce_mean − ce); {_HARMLESS}"),
    Column("kl", _F, "nat/token", f"mean KL(untouched ‖ spliced as for ce_sae); {_CE}"),
    Column(
        "top1_agreement",
        _F,
        "1",
        f"share of tokens with the same likeliest next one, spliced as for ce_sae; {_CE}",
    ),
    Column("delta_ce_spliced", _F, "nat/token", f"delta_ce {_FROM_SPLICED}"),
    Column("kl_spliced", _F, "nat/token", f"kl {_FROM_SPLICED}"),
    Column("top1_agreement_spliced", _F, "1", f"top1_agreement {_FROM_SPLICED}"),
)


def _bounds(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """Two columns a column: the ends of its interval."""
    ends = (("low", "lower"), ("high", "upper"))
    return tuple(
        Column(
            f"{of.name}_{end}",
            _F,
            of.unit,
            f"{side} end of the 95% interval of {of.name}; null below 10 sequences",
        )
        for of in columns
        for end, side in ends
    )


_SHARED = (*_COUNTS, *_ROWS, *_SHARES)
_SCORES = (*_TOKENS, *_ENTROPY)

LAYER_METRICS = (
    Column("layer", _L, "layer", "0-based block index"),
    *_SHARED,
    *_PCA,
    *_STORE,
    *_SCORES,
    *_bounds((*_ROWS, *_ENTROPY)),
)

OVERALL_METRICS = (
    Column("over", pa.string(), "", "`mean` or `all`, which the other columns are read by"),
    *_SHARED,
    *_SCORES,
    *_bounds((*_ROWS, *_ENTROPY)),
)
