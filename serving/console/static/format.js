// Numbers as people read them, with their units.

const DIGITS = { maximumSignificantDigits: 3 };
const plain = new Intl.NumberFormat("en", DIGITS);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const NONE = "–";
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);

export const count = (x) => (known(x) ? whole.format(x) : NONE);
export const number = (x) => (known(x) ? plain.format(x) : NONE);
export const percent = (x) => (known(x) ? `${Math.abs(x) < 0.0995 && x !== 0 ? (100 * x).toFixed(1) : Math.round(100 * x)} %` : NONE);
export const perSecond = (x) => (known(x) ? `${x === 0 ? "0" : x < 10 ? x.toFixed(1) : whole.format(x)}/s` : NONE);
export const credits = (x) => (known(x) ? `${Math.abs(x) >= 100 ? whole.format(x) : x.toFixed(2)} cr` : NONE);
export const amount = (x) => (known(x) ? (Math.abs(x) >= 1000 ? whole.format(x) : x.toFixed(2)) : NONE);
export const signed = (x) => (known(x) ? `${x > 0 ? "+" : x < 0 ? "−" : "±"}${number(Math.abs(x))}` : NONE);
export const time = (at_s) => clock.format(new Date(1000 * at_s));

export function seconds(x) {
  if (!known(x)) return NONE;
  if (x < 0.0995) return `${Math.round(1000 * x)} ms`;
  if (x < 9.95) return `${x.toFixed(1)} s`;
  if (x < 120) return `${Math.round(x)} s`;
  return x < 7200 ? `${Math.round(x / 60)} min` : `${Math.round(x / 3600)} h`;
}

export function tokens(x) {
  if (!known(x)) return NONE;
  const said = x < 10_000 ? whole.format(x) : x < 1e6 ? `${plain.format(x / 1e3)} k` : `${plain.format(x / 1e6)} M`;
  return `${said} ${said === "1" ? "token" : "tokens"}`;
}

// How much longer something took than was said, from the log of the ratio.
export function lateness(log) {
  if (!known(log)) return NONE;
  const share = Math.exp(log) - 1;
  if (Math.abs(share) < 0.005) return "as promised";
  return `${Math.round(100 * Math.abs(share))} % ${share > 0 ? "slower" : "faster"}`;
}

export const shortKey = (key) => key.slice(0, 8);
