// Standard normal noise of a seed, as torch draws it on a CPU, so that a seed is the same image here as in onefold:
// 32-bit numbers of the Mersenne Twister (Matsumoto & Nishimura, 1998), of which 24 bits make a uniform number, and
// pairs of these a Gaussian pair (Box & Muller, 1958), eight apart in blocks of sixteen.

function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let k = 1; k < 624; k++) {
    state[k] = Math.imul(1812433253, state[k - 1] ^ (state[k - 1] >>> 30)) + k;
  }
  let at = 624;
  return () => {
    if (at === 624) {
      for (let k = 0; k < 624; k++) {
        const y = (state[k] & 0x80000000) | (state[(k + 1) % 624] & 0x7fffffff);
        state[k] = state[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    let y = state[at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** `count` ≥ 16 numbers of a seed below 2³². */
export function noise(seed, count) {
  const next = twister(seed);
  const uniform = () => (next() & 0xffffff) / 0x1000000;
  const found = Float32Array.from({ length: count }, uniform);
  const pair = (start) => {
    for (let k = start; k < start + 8; k++) {
      const radius = Math.sqrt(-2 * Math.log(1 - found[k]));
      const angle = 2 * Math.PI * found[k + 8];
      found[k] = radius * Math.cos(angle);
      found[k + 8] = radius * Math.sin(angle);
    }
  };
  for (let start = 0; start + 16 <= count; start += 16) pair(start);
  if (count % 16) {  // the last sixteen are drawn anew
    for (let k = count - 16; k < count; k++) found[k] = uniform();
    pair(count - 16);
  }
  return found;
}
