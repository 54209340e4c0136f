"""An analysis in the forms of other tools."""
