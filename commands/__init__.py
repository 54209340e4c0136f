"""Commands below `mlsae`, a file each: parse, call the library, print.

Everything heavy is imported inside its command, so that help is quick and `mlsae train` never loads
transformers.
"""
