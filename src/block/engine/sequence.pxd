cdef class Sequence:
    cdef public object key
    cdef public long long prompt
    cdef public long long max_tokens
    cdef public long long stop_after
    cdef public long long priority
    cdef public double order
    cdef public object block_keys
    cdef public long long computed
    cdef public long long output
    cdef public long long placeholders
    cdef public long long in_flight
    cdef public long long stale
    cdef public long long blocks
    cdef public list block_ids
    cdef public long long cached_blocks
    cdef public long long hit_tokens
    cdef public long long preemptions
    cdef public int status
    # Times that whoever drives the scheduler notes here, seconds; negative: not yet.
    cdef public double arrived_s
    cdef public double scheduled_s
    cdef public double first_token_s
    cdef public double finished_s

    cpdef object block_key(self, long long i)


cdef class Batch:
    cdef public list sequences
    cdef public list tokens
    cdef public list samples
    cdef public list chunks
    cdef public long long total_tokens
    cdef public long long decode_requests
    cdef public long long context
    cdef public long long prefill_tokens
    cdef public double prefill_work
    cdef public long long shared
    cdef public list preempted
