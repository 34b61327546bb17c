enum Answer {
  Yes = 'yes',
  No = 'no',
  Unsure = 'unsure',
}

class Poll {
  private votes = { [Answer.Yes]: 0, [Answer.No]: 0, [Answer.Unsure]: 0 };

  constructor(public readonly question: string) {}

  vote(answer: Answer): void {
    this.votes[answer] += 1;
  }

  share(answer: Answer): number {
    const all = Object.values(this.votes).reduce((a, b) => a + b, 0);
    return all === 0 ? 0 : this.votes[answer] / all;
  }
}

const poll = new Poll('Should the park stay open at night?');
poll.vote(Answer.Yes);
poll.vote(Answer.No);
console.log(poll.share(Answer.Yes));
