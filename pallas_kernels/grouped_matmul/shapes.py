"""Shapes of DeepSeek-V3's experts: training (rows sorted by expert) and decode (a fixed room of rows for each)."""

NK = ((4096, 7168), (7168, 2048))  # gate and up; down
GROUPED = tuple((groups, rows, n, k) for groups, rows in ((4, 8192), (8, 4096), (256, 256)) for n, k in NK)  # rows: of the mean group
DECODE = tuple((256, 8, n, k) for n, k in NK)  # 2,048 rows of a decode step, all experts on one device; fewer rows take its tiles
MASKED = tuple((groups, rows, 4096, n, k) for groups, rows in ((32, 192), (32, 20)) for n, k in NK)  # mean count; room
