const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Run the jobs with at most `limit` of them in flight at once.
async function runAll(jobs, limit = 2) {
  const results = new Array(jobs.length);
  let next = 0;

  async function worker() {
    while (next < jobs.length) {
      const index = next++;
      results[index] = await jobs[index]();
    }
  }

  await Promise.all(Array.from({ length: limit }, worker));
  return results;
}

const jobs = [30, 10, 20].map((ms) => async () => {
  await wait(ms);
  return ms * 2;
});

runAll(jobs).then((results) => console.log(results));
