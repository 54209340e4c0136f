"""The published method, reproduced step by step for comparison."""
