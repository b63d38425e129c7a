"""The (N, K) of DeepSeek-V3's dense products, and the row counts they are benchmarked at."""

NK = (
    (2112, 7168),  # query and key/value latents, one projection
    (24576, 1536),  # queries from their latent
    (32768, 512),  # keys and values from their latent
    (7168, 16384),  # attention output
    (4096, 7168),  # gate and up of an expert
    (7168, 2048),  # down of an expert
)
ROWS = (1, 16, 64, 128, 4096, 16384)
MNK = tuple((m, n, k) for m in ROWS for n, k in NK)
