using System;
using System.Collections.Generic;

public static class BinarySearch
{
    public static int Find<T>(IReadOnlyList<T> sorted, T wanted) where T : IComparable<T>
    {
        int low = 0;
        int high = sorted.Count - 1;
        while (low <= high)
        {
            int middle = low + (high - low) / 2;
            int order = sorted[middle].CompareTo(wanted);
            if (order == 0)
            {
                return middle;
            }
            if (order < 0)
                low = middle + 1;
            else
                high = middle - 1;
        }
        return -1;
    }
}
