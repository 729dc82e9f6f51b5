"""A program for a container: compile one of our kernels, and a module of C as Triton does.

Prints `cubin 7 False`: machine code was made, the module works, and there is no nvcc.
"""

import shutil

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.build import compile_module_from_src

from pmp_ds.ticket import counting_cuda as ours

TYPES = {"raw": "*i32", "bits": "*u8", "numel": "i64", "shift": "i32"}
TYPES |= dict.fromkeys(("counts", "top", "key", "before", "quota"), "*i64")
FIXED = {"WITHIN": True, "SIGN": 0x7FFFFFFF, "BLOCK": ours.BLOCK}

# At its first use on a GPU, Triton compiles such a module, which then speaks to the driver.
MODULE = """
#include <Python.h>
static PyObject *seven(PyObject *self, PyObject *args) { return PyLong_FromLong(7); }
static PyMethodDef all[] = {{"seven", seven, METH_NOARGS, ""}, {0}};
static struct PyModuleDef it = {PyModuleDef_HEAD_INIT, "probe", "", -1, all};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&it); }
"""


def main() -> None:
    own = {name: TYPES.get(name, "constexpr") for name in ours._masks.arg_names}
    constants = {name: FIXED[name] for name, kind in own.items() if kind == "constexpr"}
    made = compile(ASTSource(ours._masks, own, constants), target=GPUTarget("cuda", 90, 32))
    print("cubin" if made.asm["cubin"] else "nothing")
    print(compile_module_from_src(MODULE, "probe").seven(), shutil.which("nvcc") is not None)


if __name__ == "__main__":
    main()
