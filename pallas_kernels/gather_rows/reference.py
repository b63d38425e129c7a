"""Plain JAX."""


def gather_rows(x, index):
    return x.at[index].get(mode="fill", fill_value=0)
