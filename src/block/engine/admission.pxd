from block.engine.store cimport EngineStore


cdef class Admission(EngineStore):
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
