cimport cython

from block.engine.store cimport EngineStore


@cython.final
cdef class FastEngine(EngineStore):
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
    cdef int _fill(self) noexcept
    cdef int _fill_in_order(self) noexcept
    cdef int _wanted(self, int r, int left) noexcept
    cdef int _blocks_wanted(self, int r, int tokens) noexcept
    cdef void _take_blocks(self, int r, int blocks) noexcept
    cdef int _choose_victim(self) noexcept
    cdef void _set_aside(self) noexcept
    cdef void _take_back(self) noexcept
    cdef void _admit_waiting(self, int budget) noexcept
    cdef bint _head_fits(self, int budget, int free) noexcept
    cdef bint _grow(self, int r, int tokens) noexcept
    cdef void _preempt(self, int r, int tokens) noexcept
    cdef void _enter_decoding(self, int r) noexcept
    cdef void _join(self, int r, int last) noexcept
    cdef int _leaves_at(self, int r, int last) noexcept
    cdef void _leave_decoding(self, int r) noexcept
    cdef void _remove_from_decoding(self, int r) noexcept
    cdef void _end(self, int r) noexcept
    cdef void _look(self, int r) noexcept
    cdef void _give_back(self, int r, int blocks, bint over) noexcept


cdef double _sum_s(int m, double first_s, double growth_s) noexcept
cdef int _steps_until(double wait_s, double first_s, double growth_s, int most) noexcept
