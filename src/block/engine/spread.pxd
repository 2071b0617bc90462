from block.engine.kernel cimport FastEngine

cpdef spread(
    list engines, double[::1] opens_s, double[::1] closes_s, double[::1] at_s, int[::1] prompts, int[::1] outputs,
    int[::1] labels, double until_s, double[:, ::1] out, int[::1] placed)
cpdef forget_labels(FastEngine engine)
cdef int _emptiest(list engines, double[::1] opens_s, double[::1] closes_s, double now_s, int first) noexcept
cdef void _note(FastEngine engine, double[:, ::1] out) noexcept
