from block.steptime.curve cimport StepCurve

cdef int PROMPT, STOP, MAX_TOKENS, DONE, G0, KEY, STATE, COMPUTED, BLOCKS, HIT, PREEMPTIONS, BELIEVED, LABEL, PRIORITY, HELD, TOKENS, ARRIVED, SCHEDULED, FIRST, FINISHED, UNUSED, EXPECTED, WAITING, PREFILL, DECODE, LAST, DONE_STATE


cdef class EngineStore:
    cdef int[:, ::1] rows
    cdef double[:, ::1] times
    cdef int[::1] order  # running, in admission order; entries of finished requests stay until compaction
    cdef int[::1] waiting  # ring
    cdef int[::1] arrivals  # ring, by time
    cdef int[::1] heap_key
    cdef int[::1] heap_row
    cdef int[::1] hist
    cdef int[::1] prefilling
    cdef int[::1] completed  # scratch of one step
    cdef int[::1] retired  # LAST since the schedule before this one
    cdef int[::1] firsts  # ring: rows whose first token is in flight
    cdef int[::1] firsts_due
    cdef int[::1] free_rows
    cdef int[::1] ended  # finished rows that nobody has collected
    cdef StepCurve curve
    cdef public object limits
    cdef int block_size
    cdef int budget_max
    cdef int running_max
    cdef int model_len
    cdef int watermark
    cdef bint reserve
    cdef bint chunked
    cdef bint by_priority
    cdef int prefill_cap  # most prompt tokens of one request in a step
    cdef int cap  # the same in this step: a request alone has no cap
    cdef int lag
    cdef public bint jumping
    cdef public object cache
    cdef int looked_row
    cdef long long looked_version
    cdef int capacity
    cdef int used
    cdef int order_n
    cdef int wait_head
    cdef int wait_n
    cdef int arrival_head
    cdef int arrival_n
    cdef int heap_n
    cdef int prefill_n
    cdef int retired_n
    cdef int first_head
    cdef int first_n
    cdef int free_n
    cdef int ended_n
    cdef int g
    cdef int nd
    cdef int running_n
    cdef int free
    cdef long long context
    cdef long long waiting_tokens
    cdef double now
    cdef double gpu_end
    cdef double heat  # tokens prefilled lately (see curve)
    cdef int held  # blocks of running requests that are charged to another one
    cdef double heated_s  # when that was counted
    cdef bint in_flight  # whether batch g-1 computes anything
    cdef int target
    cdef long long preemption_count
    cdef long long step_count

    cdef int _residue(self, int g) noexcept
    cdef int _blocks_for(self, int tokens) noexcept
    cdef int _done(self, int r) noexcept
    cdef int _computed(self, int r) noexcept
    cdef int _computed_at(self, int r) noexcept
    cdef int _class(self, int computed) noexcept
    cdef int _add(self, int prompt, int max_tokens, int stop, double at_s, int believed, int hit, int label, int priority) noexcept
    cdef void _arrive(self) noexcept
    cdef bint _before(self, int a, int b) noexcept
    cdef void _queue(self, int r) noexcept
    cdef void _requeue(self, int r) noexcept
    cdef void _push_order(self, int r) noexcept
    cdef bint _runs(self, int r) noexcept
    cdef int _pop_last(self) noexcept
    cdef void _remove_from_order(self, int i) noexcept
    cdef void _compact_order(self) noexcept
    cdef void _heap_push(self, int key, int r) noexcept
    cdef void _heap_pop(self) noexcept
    cdef void _heap_rebuild(self) noexcept
    cdef int _borrowed(self, long long blocks) noexcept
    cdef int _new_row(self) noexcept
    cdef void _take_limits(self, EngineStore other) noexcept
    cdef void _copy(self, EngineStore other) noexcept
