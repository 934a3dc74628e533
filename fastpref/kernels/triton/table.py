"""Tiles by device, width of dtype, H and V: rows of configs.py, of which the first that fits is taken.

Written by benchmarks/tune_triton.py, which measures; a row with nothing in `measured` is a reasoned start: the operands
of all stages within shared memory (163 KiB on sm_80, 99 on sm_86, 227 on sm_90 and sm_100, 64 on gfx942), two fp32
accumulators within 255 registers a thread. tests/test_triton_aot.py compiles every row.
"""

from fastpref.kernels.triton.configs import Config, Product, Row, Score

ROWS = (
    Row(
        "sm_80",
        16,
        0,
        0,
        Config(Score(128, 64, 32, 8, 8, 4, 8), Product(128, 128, 32, 8, 4), Product(128, 128, 32, 8, 6), True),
        "",
    ),
    Row(
        "sm_80",
        32,
        0,
        0,
        Config(Score(64, 64, 32, 8, 8, 3, 8), Product(64, 64, 32, 8, 3), Product(64, 64, 32, 8, 4), True),
        "",
    ),
    Row(
        "sm_86",
        16,
        0,
        0,
        Config(Score(128, 64, 32, 8, 8, 4, 8), Product(128, 128, 32, 8, 4), Product(128, 128, 32, 8, 6), True),
        "",
    ),
    Row(
        "sm_86",
        32,
        0,
        0,
        Config(Score(64, 64, 32, 8, 8, 2, 8), Product(64, 64, 32, 8, 3), Product(64, 64, 32, 8, 4), True),
        "",
    ),
    Row(
        "sm_90",
        16,
        0,
        0,
        Config(Score(128, 128, 64, 4, 8, 4, 4), Product(128, 256, 64, 8, 3), Product(128, 128, 64, 8, 6), True),
        "",
    ),
    Row(
        "sm_90",
        32,
        0,
        0,
        Config(Score(64, 64, 32, 8, 8, 3, 8), Product(64, 64, 32, 8, 3), Product(64, 64, 32, 8, 4), True),
        "",
    ),
    Row(
        "sm_100",
        16,
        0,
        0,
        Config(Score(128, 64, 64, 8, 8, 4, 4), Product(128, 128, 64, 8, 3), Product(128, 128, 64, 8, 5), True),
        "",
    ),
    Row(
        "sm_100",
        32,
        0,
        0,
        Config(Score(64, 64, 32, 8, 4, 2, 8), Product(64, 64, 32, 8, 3), Product(64, 64, 32, 8, 4), True),
        "",
    ),
    Row(
        "gfx942",
        16,
        0,
        0,
        Config(Score(128, 64, 64, 8, 8, 2, 4), Product(128, 128, 32, 8, 2), Product(128, 128, 32, 8, 2), False),
        "",
    ),
    Row(
        "gfx942",
        32,
        0,
        0,
        Config(Score(64, 64, 32, 8, 8, 2, 8), Product(64, 64, 32, 8, 2), Product(64, 64, 32, 8, 2), False),
        "",
    ),
)
