"""The columns of the tables of latents, events and examples: name, type, unit, definition."""

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    """Name in the file."""

    type: pa.DataType
    """Arrow type."""

    unit: str
    """Unit, or `1` for pure numbers."""

    text: str
    """Definition, and when the value is null."""


TOP, TOP_LAYER, SAMPLE = KINDS = ("top", "top_layer", "sample")
"""Values of the column `kind` of the table `examples`."""

_F, _S, _I, _L = pa.float64(), pa.float32(), pa.int64(), pa.int32()
_BY_COUNT = "by counts instead of totals; null if dead"
_EMBEDDING = "null where no transformer of that width was at hand"
_VALUE = "value of the latent, not 0; whether it can be below 0 is up to the architecture"
_JOINT = "over the joint tokens, null if active for none"

LATENTS = (
    Column("latent", _L, "latent", "index of the latent"),
    Column(
        "count", _I, "(row, layer)", "eligible rows at which the latent is active, over all layers"
    ),
    Column("total", _F, "latent value", "sum of the latent's values"),
    Column("mean", _F, "latent value", "total / count; null if dead"),
    Column("layer_mean", _F, "layer", "Σ_l l · P(l | latent), in layer ids; null if dead"),
    Column("layer_var", _F, "layer²", "Σ_l (l − layer_mean)² · P(l | latent); null if dead"),
    Column("layer_std", _F, "layer", "√layer_var; null if dead"),
    Column("layer_entropy", _F, "nat", "−Σ_l P(l | latent) · ln P(l | latent); null if dead"),
    Column("layer_mean_by_count", _F, "layer", f"layer_mean {_BY_COUNT}"),
    Column("layer_var_by_count", _F, "layer²", f"layer_var {_BY_COUNT}"),
    Column("layer_std_by_count", _F, "layer", f"layer_std {_BY_COUNT}"),
    Column("layer_entropy_by_count", _F, "nat", f"layer_entropy {_BY_COUNT}"),
    Column(
        "layer_bimodality",
        _F,
        "1",
        "(skewness² + 1) / kurtosis of P(l | latent): 1 where two layers share the latent, 5/9 "
        "where many share it equally; null if dead or active at one layer alone",
    ),
    Column("layer_bimodality_by_count", _F, "1", "layer_bimodality by counts"),
    Column("num_layers", _L, "layer", "layers at which the latent is active for any row"),
    Column(
        "layer_var_token",
        _F,
        "layer²",
        "variance of the layer at one token, averaged over tokens with their totals over layers "
        f"as weights; {_JOINT}",
    ),
    Column(
        "token_entropy",
        _F,
        "nat",
        f"−Σ p · ln p over token ids, p the share of an id in the latent's total; {_JOINT}",
    ),
    Column(
        "num_token_ids",
        _I,
        "token id",
        "token ids among the joint tokens for which the latent is active",
    ),
    Column("density", _F, "1", "count / (rows evaluated, over all layers)"),
    Column("dead", pa.bool_(), "", "count = 0 over the rows evaluated"),
    Column(
        "decoder_cosine",
        _F,
        "1",
        "largest cosine between the decoder directions of this latent and another; null if there "
        "is no other",
    ),
    Column("decoder_latent", _L, "latent", "the other latent of decoder_cosine"),
    Column(
        "embedding_cosine",
        _F,
        "1",
        f"largest cosine between decoder direction and a row of the token embedding; {_EMBEDDING}",
    ),
    Column("embedding_token", _L, "token id", "the token id of embedding_cosine"),
    Column(
        "unembedding_cosine",
        _F,
        "1",
        f"largest cosine between decoder direction and a row of the unembedding; {_EMBEDDING}",
    ),
    Column("unembedding_token", _L, "token id", "the token id of unembedding_cosine"),
)

LATENT_LAYERS = (
    Column("latent", _L, "latent", "index of the latent"),
    Column("layer", _L, "layer", "0-based block index"),
    Column("count", _I, "row", "eligible rows of the layer at which it is active"),
    Column("total", _F, "latent value", "sum of the latent's values at the layer"),
    Column("mean", _F, "latent value", "total / count; null if never active at the layer"),
    Column("prob", _F, "1", "P(layer | latent) = total / total over all layers; null if dead"),
    Column("prob_by_count", _F, "1", "count / count over all layers; null if dead"),
)

PREFIXES = (
    Column("layer", _L, "layer", "0-based block index; null for all layers together"),
    Column("num_latents", _I, "latent", "first latents that the row is about: a prefix, or all"),
    Column("num_rows", _I, "row", "eligible rows evaluated"),
    Column(
        "fvu",
        _F,
        "1",
        "FVU of the reconstruction by these latents alone, about each layer's mean; null if the "
        "rows do not vary",
    ),
    Column("l0", _F, "latent", "mean number of these latents that are active at a row"),
    Column(
        "layer_entropy",
        _F,
        "nat",
        "mean layer_entropy of those that are not dead; null where all are, and by layer",
    ),
    Column("dead_fraction", _F, "1", "share that is active at none of the rows; null by layer"),
)

HISTOGRAMS = (
    Column("histogram", pa.string(), "", "name: layer_mean, layer_mean_to_whole or decoder_cosine"),
    Column("low", _F, "layer, or 1", "lower end of the bin"),
    Column("high", _F, "layer, or 1", "upper end, included in the last bin alone"),
    Column("count", _I, "latent or pair", "living latents, or pairs of any latents, in the bin"),
)

LAYER_COSINE = (
    Column("distance_low", _F, "layer", "lower end of |difference of layer_mean|"),
    Column("distance_high", _F, "layer", "upper end, included in the last bin alone"),
    Column("cosine_low", _F, "1", "lower end of the cosine of the decoder directions"),
    Column("cosine_high", _F, "1", "upper end, included in the last bin alone"),
    Column("count", _I, "pair", "pairs of two living latents, each pair once; above 0"),
)

EXAMPLES = (
    Column("latent", _L, "latent", "index of the latent"),
    Column("layer", _L, "layer", "0-based block index of the peak"),
    Column(
        "kind",
        pa.string(),
        "",
        "top: among the tokens of the latent's largest values, one row a token, at the layer where "
        "the value there is largest; top_layer: among the largest at the layer; sample: drawn at "
        "random from one range of the latent's values at all layers",
    ),
    Column("rank", _L, "example", "0 is the largest of its kind, layer or range"),
    Column(
        "quantile",
        _L,
        "range",
        "range of a sample, 0 to 3: a quarter of the latent's values by size; null for other kinds",
    ),
    Column("low", _S, "latent value", "lower end of the range, not part of it"),
    Column("high", _S, "latent value", "upper end of the range, part of it"),
    Column("row", _I, "row", "row of the peak in the store's activations"),
    Column("token", _I, "token", "the row's token, as in events"),
    Column("token_ids", pa.list_(_L), "token id", "the window: the tokens around the peak"),
    Column("peak", _L, "token", "place of the peak in the window, from 0"),
    Column(
        "pieces",
        pa.list_(pa.string()),
        "",
        "text of each token of the window; null where the tokenizer was not at hand",
    ),
    Column(
        "values",
        pa.list_(_S),
        "latent value",
        "the latent's value at each token of the window at the layer; null at tokens that are no "
        "eligible rows",
    ),
    Column(
        "layer_values",
        pa.list_(_S),
        "latent value",
        "the latent's value at the peak at each layer of the SAE, ascending",
    ),
    Column("value", _S, "latent value", "magnitude of the latent's value at the peak, above 0"),
)

EVENTS = (
    Column("row", _I, "row", "row of the store's activations"),
    Column(
        "token",
        _I,
        "token",
        "the row's token; sequence = token // context length, position = token % context length",
    ),
    Column("layer", _L, "layer", "0-based block index"),
    Column("latent", _L, "latent", "index of an active latent"),
    Column("value", pa.float32(), "latent value", _VALUE),
)

PROMPTS = (
    Column("prompt", _L, "prompt", "number of the prompt, from 0, in the order given"),
    Column("position", _L, "token", "place of the token in the prompt, a BOS before it included"),
    Column("token_id", _L, "token id", "the token"),
    Column("piece", pa.string(), "", "text of the token; `�` for a part of a character"),
    Column(
        "eligible",
        pa.bool_(),
        "",
        "no special token, and a position of at least the SAE's skip_positions",
    ),
    Column("layer", _L, "layer", "0-based block index"),
    Column("latent", _L, "latent", "index of an active latent"),
    Column("value", pa.float32(), "latent value", _VALUE),
)
