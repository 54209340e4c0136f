"""Words that several rooms share."""

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites of a block: the residual stream before it, between attention and MLP, and after it, then
the sums that attention and MLP add to it. The names are TransformerLens's."""

Key = tuple[str, int]
"""Site and layer of an array of activations."""
