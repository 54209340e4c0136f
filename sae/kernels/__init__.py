"""Operations on rows and latents that cost time: selection, sparse products."""
