import cython


cdef class Heard:
    cdef public double last_byte_s


cdef class Relay:
    cdef public object write
    cdef public bint plain
    cdef public Heard source
    cdef public double heard_s
    cdef public long long events
    cdef public bytes before_last
    cdef public bytes last

    cpdef object body_received(self, bytes data)

    @cython.locals(now_s=double)
    cpdef object pass_on(self, bytes data)


cdef class Inlet:
    cdef public Relay relay

    cpdef object received(self, bytes data)


@cython.locals(size=Py_ssize_t, at=Py_ssize_t, told=Py_ssize_t, digit=int)
cpdef bint is_one_chunk(bytes data)
