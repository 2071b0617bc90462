from block.engine.kernel cimport FastEngine

cpdef ask_all(
    list engines, FastEngine scratch, int prompt, int max_tokens, int[::1] totals, int[::1] hits, int priority, double at_s,
    double horizon_s, bint believing, bint harm, double[:, ::1] out)
cpdef ask_mirrors(
    list mirrors, FastEngine scratch, int prompt, int max_tokens, int[::1] totals, int[::1] hits, int priority, double now_s,
    double horizon_s, bint harm, double[:, ::1] out)
cdef int _ask_one(
    FastEngine engine, FastEngine scratch, int prompt, int max_tokens, int[::1] totals, int hit, int priority, double at_s,
    double horizon_s, bint believing, bint harm, double[:, ::1] out, int i) except -1
cdef int _ask(FastEngine engine, int prompt, int max_tokens, int total, double at_s, int hit, int priority, double horizon_s) noexcept
cdef double _finish_sum(FastEngine engine, int before, double until_s) noexcept
