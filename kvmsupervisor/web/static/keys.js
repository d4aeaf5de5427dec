// Keys by name, and text as strokes on a US keyboard. Symbols are X11's keysyms, codes those of KeyboardEvent.code.

const NAMED = {
  Control: [0xffe3, "ControlLeft"], Alt: [0xffe9, "AltLeft"], Shift: [0xffe1, "ShiftLeft"], Super: [0xffeb, "MetaLeft"],
  Delete: [0xffff, "Delete"], Backspace: [0xff08, "Backspace"], Tab: [0xff09, "Tab"], Escape: [0xff1b, "Escape"],
  Print: [0xff61, "PrintScreen"], SysRq: [0xff61, "PrintScreen"], Insert: [0xff63, "Insert"],
};
for (let number = 1; number <= 12; number += 1) NAMED[`F${number}`] = [0xffbd + number, `F${number}`];

// The keys of a combination such as Control+Alt+Delete, in the order in which they are pressed.
export function keysOf(combination) {
  return combination.split("+").map((name) => NAMED[name] ?? [name.charCodeAt(0), `Key${name.toUpperCase()}`]);
}

const ROWS = [
  ["`1234567890-=", "~!@#$%^&*()_+",
    "Backquote Digit1 Digit2 Digit3 Digit4 Digit5 Digit6 Digit7 Digit8 Digit9 Digit0 Minus Equal"],
  ["[]\\;',./", "{}|:\"<>?", "BracketLeft BracketRight Backslash Semicolon Quote Comma Period Slash"],
];
const CODES = new Map([[" ", ["Space", false]], ["\n", ["Enter", false]], ["\t", ["Tab", false]]]);
for (const letter of "abcdefghijklmnopqrstuvwxyz") {
  CODES.set(letter, [`Key${letter.toUpperCase()}`, false]);
  CODES.set(letter.toUpperCase(), [`Key${letter.toUpperCase()}`, true]);
}
for (const [plain, shifted, codes] of ROWS) {
  codes.split(" ").forEach((code, place) => {
    CODES.set(plain[place], [code, false]);
    CODES.set(shifted[place], [code, true]);
  });
}
const SYMBOLS = { "\n": 0xff0d, "\t": 0xff09 };

// Strokes [keysym, code, down] that type a text, and the characters for which there is no key.
export function strokes(text) {
  const keys = [];
  let left = "";
  for (const character of text.replaceAll("\r\n", "\n")) {
    const found = CODES.get(character);
    if (found === undefined) {
      left += character;
      continue;
    }
    const [code, shifted] = found;
    const symbol = SYMBOLS[character] ?? character.codePointAt(0);
    if (shifted) keys.push([...NAMED.Shift, true]);
    keys.push([symbol, code, true], [symbol, code, false]);
    if (shifted) keys.push([...NAMED.Shift, false]);
  }
  return [keys, left];
}
