"""python -m pallas_kernels: the benchmark tables of all FP8 products, on this GPU."""

from pallas_kernels import bench
from pallas_kernels.grouped_matmul import bench as grouped
from pallas_kernels.matmul import bench as dense
from pallas_kernels.wgrad import bench as wgrad

if __name__ == "__main__":
    bench.require_hopper()
    bench.tables(grouped.TABLE, dense.TABLE, wgrad.TABLE)
    dense.sustained()
