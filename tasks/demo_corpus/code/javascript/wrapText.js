function wrapText(text, width = 30) {
  const lines = [];
  let line = '';

  for (const word of text.split(/\s+/)) {
    const longer = line ? `${line} ${word}` : word;
    if (longer.length > width && line) {
      lines.push(line);
      line = word;
    } else {
      line = longer;
    }
  }

  if (line) lines.push(line);
  return lines;
}

const note = 'The bakery opens at seven, but the good rolls are usually gone by eight.';
wrapText(note).forEach((line) => console.log(line));
