cimport cython

from block.engine.admission cimport Admission


@cython.final
cdef class FastEngine(Admission):
    cdef void _adopt(self, FastEngine other, bint believing) noexcept
    cdef void _believe(self) noexcept
    cdef bint _idle(self) noexcept
    cdef void _run(self, double until_s) noexcept
    cdef void _settle(self) noexcept
    cdef double _heat(self, int prefill) noexcept
    cdef void _tick(self, double step_s, double launch_s) noexcept
    cdef bint _jump(self, double until_s) noexcept
    cdef int _steps_before_change(self, double until_s, double first_s, double growth_s) noexcept
    cdef int _blocks_over(self, int m) noexcept
    cdef int _steps_within_blocks(self, int m) noexcept
    cdef bint _step(self) noexcept
    cdef bint _compute(self) noexcept
    cdef bint _empty_step(self) noexcept


cdef double _sum_s(int m, double first_s, double growth_s) noexcept
cdef int _steps_until(double wait_s, double first_s, double growth_s, int most) noexcept
