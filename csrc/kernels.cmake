# CPU kernels: every file of cpu/kernels once per capability, chosen at run time. Sets kernel_libraries (object
# libraries), capabilities, and kernel_definitions for whoever calls them.
set(kernels
  count_zeros crc32 expand fold gate gate_penalty group_masks magnitude_counts norms pack pack_sparse park probe
  sparse_block sparse_panel sparse_rows sparsegpt_block threshold unit_scores)
set(capabilities portable)
# Exact products and sums in a fixed order are part of the contract, so no contraction and no fast-math. Without errno
# and traps, which nobody reads, roots and choices become vector instructions; no result changes.
set(kernel_flags -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND capabilities avx2 avx512)
  set(kernel_definitions PYPRUNE_X86)
  set(flags_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt)
  set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
endif()
foreach(capability IN LISTS capabilities)
  add_library(kernels_${capability} OBJECT)
  foreach(kernel IN LISTS kernels)
    target_sources(kernels_${capability} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/cpu/kernels/${kernel}.cpp)
  endforeach()
  target_compile_definitions(kernels_${capability} PRIVATE ${kernel_definitions} PYPRUNE_CAPABILITY=${capability})
  # Switched off: g++ 12 finds its own AVX-512 headers at fault; vectors passed between inlined functions have no ABI.
  target_compile_options(kernels_${capability} PRIVATE
    -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized -Wno-psabi ${kernel_flags} ${flags_${capability}})
  list(APPEND kernel_libraries kernels_${capability})
endforeach()
