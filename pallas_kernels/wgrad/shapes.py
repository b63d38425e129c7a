"""Weight gradients of DeepSeek-V3's experts: (N, K, tokens), and (groups, tokens of the mean group, N, K)."""

DENSE = ((7168, 4096, 8192), (4096, 7168, 8192), (7168, 2048, 8192))
GROUPED = tuple((4, 8192, n, k) for n, k in ((4096, 7168), (7168, 2048)))
