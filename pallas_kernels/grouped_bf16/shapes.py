"""Shapes of the experts of the recipes that train or serve in bfloat16: (groups, rows of the mean group, N, K, transposed)."""

# training: gate and up, then down, forward and for the inputs
SMALL = ((24, 8192, 4096, 1024, True), (24, 8192, 1024, 4096, False), (24, 8192, 1024, 2048, True), (24, 8192, 2048, 1024, False))
# decoding 64 tokens, a prompt's chunk of 1,024
MOONLIGHT = tuple((64, rows, n, k, True) for rows in (6, 96) for n, k in ((2816, 2048), (2048, 1408)))
MATMUL = SMALL + MOONLIGHT
WGRAD = tuple((24, 8192, n, k) for n, k in ((4096, 1024), (1024, 2048)))
