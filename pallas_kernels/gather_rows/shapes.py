"""(T, R, D): tokens of a card, rows of its experts, width. DeepSeek-V3's share of one of 64 cards, and recipe `small`."""

ROWS = ((4096, 32768, 7168), (65536, 393216, 1024))
