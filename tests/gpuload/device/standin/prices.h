/* What the modelled device costs, and who says so. The one table: libcuda.c charges it, `tools/gpu/simulate` prints it.
 *
 * PRICE(name, value, unit, source). STANDIN_<name>=<number> in the environment replaces a value. "Assumed" is said where
 * nobody published a number that we know of; the first GPU machine replaces all of these by measuring.
 */
PRICE(LINK_GB_S, 55, "GB/s", "page-locked host memory to one card over PCIe 5.0 x16: 63 before headers; as much the other way, at the same time: assumed")
PRICE(FAR_LINK_GB_S, 40, "GB/s", "the same from memory of another NUMA node: assumed")
PRICE(PAGEABLE_GB_S, 38, "GB/s", "memory that nobody page-locked, in the calling thread; published for a B300")
PRICE(COPY_US, 1.5, "us", "the copy engine's own time for each copy, beside its bytes: assumed")
PRICE(CALL_US, 0.5, "us", "CPU of any call: assumed")
PRICE(MEMCPY_CALL_US, 2.5, "us", "CPU of queueing one copy: assumed")
PRICE(VMM_CALL_US, 30, "us", "create, export, import, map, unmap, release and set access of one granule: assumed")
PRICE(PIN_CALL_US, 400, "us", "cudaMallocHost and Free of 4 KB; published")
PRICE(PIN_S_GB, 0.46, "s/GB", "cudaHostAlloc of 16 GiB in 7.9 s, one at a time; NVIDIA/cudf#23457")
PRICE(REGISTER_S_GB, 0.09, "s/GB", "cudaHostRegister of 16 GiB of touched huge pages in 1.55 s; NVIDIA/cudf#23457")
PRICE(TOUCH_S_GB, 0.1, "s/GB", "huge pages that nobody has touched, cleared by the kernel in the thread that pins them: assumed, 10 GB/s")
PRICE(UNPIN_S_GB, 0.03, "s/GB", "giving page-locked memory back: assumed")
PRICE(READ_GB_S, 10, "GB/s", "one thread's pread from the page cache into memory; decisions/0001 has 17 on a calm guest")
PRICE(HASH_GB_S, 4.3, "GB/s", "one thread's BLAKE3; measured on this project's machine")
