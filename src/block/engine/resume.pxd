from block.engine.kernel cimport FastEngine

cpdef restore(
    FastEngine engine, requests, totals, hits, arrived, int running, int free, double taken_s, int batches, double batch_1_started_s,
    double newest_scheduled_s, double heat=*)
cdef void _restore(
    FastEngine engine, int[:, ::1] requests, int[::1] totals, int[::1] hits, const double[::1] arrived,
    int running, int batches, double batch_1_started_s, double newest_scheduled_s) noexcept
cdef long long _blocks_held(int[:, ::1] requests, int running) noexcept
cdef void _share(FastEngine engine, int[:, ::1] requests, int running) noexcept
cdef bint _has_work(FastEngine engine) noexcept
cdef void _restore_row(FastEngine engine, int i, int[:, ::1] requests, int total, bint running, int batches) noexcept
cdef void _resume_time(
    FastEngine engine, int[:, ::1] requests, int batches, double batch_1_started_s, double newest_scheduled_s) noexcept
cdef double _batch_s(FastEngine engine, int[:, ::1] requests, int batch, bint followed) noexcept
cdef double _batch_launch_s(FastEngine engine, int[:, ::1] requests, int batch) noexcept
