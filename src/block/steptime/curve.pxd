cdef class StepCurve:
    cdef readonly double[::1] decode_base
    cdef readonly double[::1] mixed_base
    cdef readonly double kv_s, kv_mixed_s, attention_s, chunk_s, request_s
    cdef readonly double heat_s, heat_memory_s, tile_s, tile_requests, shared_s
    cdef readonly double launch_decode_s, launch_graph_s, launch_eager_s, launch_request_s
    cdef readonly double head_s
    cdef readonly long long graph_tokens
    cpdef double decode_base_s(self, long long requests)
    cpdef double gpu_s(self, long long decode_requests, double context, long long prefill_tokens, double prefill_work, long long chunks, double heat=*, double shared=*)
    cpdef double decode_kv_s(self, long long requests)
    cpdef double heat_after(self, double heat, double elapsed_s)
    cpdef double launch_s(self, long long decode_requests, long long prefill_tokens, long long chunks)
