"""Values of the column `kind` of the table `examples`."""

TOP, TOP_LAYER, SAMPLE = KINDS = ("top", "top_layer", "sample")
