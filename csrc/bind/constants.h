// What Python must know of the native layer and only this layer can say: attributes of the module _cpu. Enumerations
// are dictionaries from the names that users write to numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>

#include "core/ops/list.h"
#include "core/status.h"
#include "cpu/kernel_table.h"
#include "cuda/launch.h"

namespace lowbit::bind {

template <class Enum>
pybind11::dict numbers(std::initializer_list<std::pair<const char*, Enum>> enumerators) {
  pybind11::dict by_name;
  for (const auto& [name, value] : enumerators) by_name[name] = static_cast<int>(value);
  return by_name;
}

inline void define_constants(pybind11::module_& m) {
  m.attr("WORD_BITS") = kWordBits;
  m.attr("GROUP") = kGroup;  // elements that share a scale
  m.attr("MOST_SAMPLES") = kMostSamples;

  pybind11::list code_bits, isa_levels;
  for (int bits = 1; bits <= 8; ++bits) {
    if (valid_bits(bits)) code_bits.append(bits);
  }
  for (int level = 0; level < kIsaCount; ++level) isa_levels.append(isa_name(static_cast<Isa>(level)));
  m.attr("CODE_BITS") = pybind11::tuple(code_bits);
  m.attr("ISA_LEVELS") = pybind11::tuple(isa_levels);  // lowest first; the index is the number

  m.attr("ENCODINGS") = numbers<Encoding>({{"sign", Encoding::sign}, {"step", Encoding::step}});
  m.attr("FLOAT_TYPES") = numbers<FloatType>(
      {{"float32", FloatType::float32}, {"bfloat16", FloatType::bfloat16}, {"float16", FloatType::float16}});
  m.attr("ACTIVATIONS") =
      numbers<Activation>({{"sign", Activation::sign}, {"step", Activation::step}, {"ternary", Activation::ternary}});
  m.attr("CONV_OUTPUTS") = numbers<ConvOutput>({{"int32", ConvOutput::int32},
                                                {"float32", ConvOutput::float32},
                                                {"bfloat16", ConvOutput::bfloat16},
                                                {"float16", ConvOutput::float16},
                                                {"bits_by_integer", ConvOutput::bits_by_integer},
                                                {"bits_by_float", ConvOutput::bits_by_float}});
  m.attr("STEP_KINDS") = numbers<StepKind>({{"multiply", StepKind::multiply},
                                            {"add", StepKind::add},
                                            {"multiply_add", StepKind::multiply_add},
                                            {"multiply_image", StepKind::multiply_image},
                                            {"add_tensor", StepKind::add_tensor},
                                            {"prelu", StepKind::prelu},
                                            {"clamp", StepKind::clamp},
                                            {"store", StepKind::store},
                                            {"bits", StepKind::bits}});
  m.attr("MOST_STEPS") = kMostSteps;
  m.attr("REDUCTIONS") =
      numbers<Reduction>({{"none", Reduction::none}, {"maximum", Reduction::maximum}, {"average", Reduction::average}});
  m.attr("CONV_ENGINES") = numbers<cuda::ConvEngine>(
      {{"popcount", cuda::ConvEngine::popcount}, {"mma", cuda::ConvEngine::mma}, {"wgmma", cuda::ConvEngine::wgmma}});
  m.attr("COUPLINGS") = numbers<Coupling>({{"independent", Coupling::independent},
                                           {"antithetic_pairs", Coupling::antithetic_pairs},
                                           {"dirichlet", Coupling::dirichlet},
                                           {"systematic", Coupling::systematic},
                                           {"gaussian", Coupling::gaussian}});
  m.attr("SAMPLE_LAYOUTS") =
      numbers<SampleLayout>({{"sample", SampleLayout::sample}, {"dimension", SampleLayout::dimension}});
  m.attr("STATUSES") = numbers<Status>({{"ok", Status::ok},
                                        {"bad_shape", Status::bad_shape},
                                        {"bad_argument", Status::bad_argument},
                                        {"unsupported_isa", Status::unsupported_isa},
                                        {"small_workspace", Status::small_workspace},
                                        {"not_finite", Status::not_finite},
                                        {"cuda_error", Status::cuda_error}});
  m.def("status_text", [](int status) { return status_text(static_cast<Status>(status)); });
}

}  // namespace lowbit::bind
