// Declares kernels once per capability, in the namespaces portable, avx2 and avx512. Users know `portable` as
// default, which C++ keeps for itself.
#pragma once

#ifdef PYPRUNE_X86
#define PYPRUNE_FOR_EACH_CAPABILITY(DECLARE) \
  namespace pyprune::portable {              \
  DECLARE                                    \
  }                                          \
  namespace pyprune::avx2 {                  \
  DECLARE                                    \
  }                                          \
  namespace pyprune::avx512 {                \
  DECLARE                                    \
  }
#else
#define PYPRUNE_FOR_EACH_CAPABILITY(DECLARE) \
  namespace pyprune::portable {              \
  DECLARE                                    \
  }
#endif
