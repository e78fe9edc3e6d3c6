#include "core/philox.h"

#include "common.h"

namespace lowbit::test {

// Known answers that come with the generator's reference implementation (Random123, kat_vectors).
LOWBIT_TEST(philox) {
  struct Known {
    uint32_t counter[4];
    uint64_t key;
    uint32_t output[4];
  };
  constexpr Known kKnown[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {{~0u, ~0u, ~0u, ~0u}, ~uint64_t{0}, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
       0x299f31d0a4093822u,
       {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
  };
  for (const Known& known : kKnown) {
    OneLane counter[4];
    for (int i = 0; i < 4; ++i) counter[i].value = known.counter[i];
    philox(counter, known.key);
    for (int i = 0; i < 4; ++i) {
      if (counter[i].value != known.output[i]) fail("philox differs from a known answer");
    }
  }
}

}  // namespace lowbit::test
