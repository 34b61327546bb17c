// Turn "?page=2&tag=a&tag=b" into an object and back again.
function parseQuery(query) {
  const result = {};
  for (const pair of query.replace(/^\?/, '').split('&')) {
    if (!pair) continue;
    const [key, value = ''] = pair.split('=').map(decodeURIComponent);
    (result[key] ??= []).push(value);
  }
  return result;
}

function buildQuery(params) {
  return Object.entries(params)
    .flatMap(([key, values]) => values.map((v) => `${key}=${encodeURIComponent(v)}`))
    .join('&');
}

const parsed = parseQuery('?page=2&tag=red%20tea&tag=mint');
console.log(parsed, buildQuery(parsed));
