# The Python module _cuda: csrc/cuda/*.cu for every architecture, and its binding. Needs nvcc, neither a GPU nor a driver.
enable_language(CUDA)

if(NOT LOWBIT_CUDA_ARCHS)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REPLACE "\n" ";" known "${known}")
  foreach(arch 75 80 86 89 90a 100 120)
    string(REPLACE "a" "" base ${arch})  # the list leaves out the specific ones
    if(sm_${base} IN_LIST known)
      list(APPEND LOWBIT_CUDA_ARCHS ${arch})
    endif()
  endforeach()
endif()
set(gencode "")
foreach(arch IN LISTS LOWBIT_CUDA_ARCHS)
  list(APPEND gencode -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
# PTX for what has no machine code: what comes after the last, and 11.0, which is between.
list(GET LOWBIT_CUDA_ARCHS -1 virtual_archs)
if(100 IN_LIST LOWBIT_CUDA_ARCHS)
  list(PREPEND virtual_archs 100)
endif()
list(REMOVE_DUPLICATES virtual_archs)
foreach(arch IN LISTS virtual_archs)
  list(APPEND gencode -gencode=arch=compute_${arch},code=compute_${arch})
endforeach()

# The kernels know nothing of pybind11 and Python: another version of them compiles the bindings alone.
file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
string(REPLACE ";" " " architectures "${LOWBIT_CUDA_ARCHS}")
string(REPLACE ";" " " virtual_architectures "${virtual_archs}")
add_library(lowbit_cuda OBJECT ${kernels})
target_include_directories(lowbit_cuda PUBLIC csrc)
target_compile_definitions(lowbit_cuda PUBLIC
  "LOWBIT_CUDA_ARCHS=\"${architectures}\"" "LOWBIT_CUDA_PTX=\"${virtual_architectures}\"")
# --fmad=false: every float operation rounds on its own, as on the CPU.
target_compile_options(lowbit_cuda PRIVATE
  -O3 --fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra --threads=2 ${gencode})
set_target_properties(lowbit_cuda PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)

pybind11_add_module(_cuda NO_EXTRAS csrc/bind/cuda_module.cpp)
target_link_libraries(_cuda PRIVATE lowbit_cuda)
target_compile_options(_cuda PRIVATE -O2 -Wall -Wextra)
set_target_properties(_cuda PROPERTIES LINKER_LANGUAGE CUDA CUDA_ARCHITECTURES OFF CUDA_RUNTIME_LIBRARY Static)
target_link_options(_cuda PRIVATE -s -Wl,--exclude-libs,ALL)
