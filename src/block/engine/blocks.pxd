from block.engine.sequence cimport Sequence


cdef class PrefixPool:
    cdef public object free
    cdef list references
    cdef list key_of
    cdef public dict blocks_of
    cdef public long long queried_tokens
    cdef public long long hit_tokens

    cpdef list find(self, Sequence seq, long long most)
    cpdef long long unreferenced(self, list blocks)
    cpdef touch(self, list blocks)
    cpdef list take(self, long long count)
    cdef void _forget(self, object block, object key)
    cpdef enter(self, object block, object key)
    cpdef release(self, list blocks)
